"""text/templates.py: how each task asks."""

from text.templates import SYSTEM, prompt


def test_questions_are_cleaned_as_the_released_model_expects():
    asked = prompt("vqa", 'What is "THIS" (really)!? #1: a~b * c;  d. ' + "word " * 60)
    assert asked.startswith("<image><ImageHere>Question:what is this really? 1 ab  c  d word")
    assert asked.count("word") == 40 and asked.endswith(
        "word Short answer:"
    )  # 50 in all, as it counts


def test_phrases_and_chats_are_asked_as_they_are():
    assert prompt("ground", "The RED circle.") == "<image><ImageHere><ref>The RED circle.</ref>"
    asked = SYSTEM + "USER: <image><ImageHere>\nHello! ASSISTANT:"
    assert prompt("chat", "Hello!") == asked
    assert prompt("chat", "Hello!", "") == SYSTEM + "USER: Hello! ASSISTANT:"
