"""serve.py: what sample.py says, over HTTP; a queue; and nothing else, whoever asks."""

import base64
import contextlib
import json
import os
import re
import shlex
import signal
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import openai
import pytest
import tiny
import torch
from PIL import Image

import sample
import serve
from support.commands import run
from support.start import load_model
from text import encode_turns
from text.templates import chat_turn, prompt


@contextlib.contextmanager
def running(folder):
    server = serve.Server("127.0.0.1", 0, "ck", *load_model(folder / "ck", device="cpu"))
    thread = threading.Thread(target=server.serve_forever, args=[0.02])
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def server(made):
    with running(made) as server:
        yield server


@pytest.fixture
def client(server):
    address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        yield client


def url(path):
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


def message(text, *pictures, role="user"):
    shown = [{"type": "image_url", "image_url": {"url": url(path)}} for path in pictures]
    return {"role": role, "content": [*shown, {"type": "text", "text": text}]}


def create(client, *messages, **settings):
    return client.chat.completions.create(model="ck", messages=messages, **settings)


def said(answer):
    return answer.choices[0].message.content


# ---- what sample.py says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, text, flags, settings",
    [
        ("chat", "hello", "--max-new-tokens 9", {"max_tokens": 9}),
        ("caption", "", "", {}),
        ("vqa", "What is it?", "", {}),
        ("ground", "the dog", "--max-new-tokens 7", {"max_completion_tokens": 7}),
        ("region", "0.1,0.2,0.6,.7", "", {}),
        (
            "chat",
            " hello ",
            "--temperature 9 --top-p 0.9 --seed 3 --max-new-tokens 9",
            {"temperature": 9, "top_p": 0.9, "seed": 3, "max_tokens": 9},
        ),
    ],
)
def test_an_answer_is_that_of_sample_py_token_for_token(
    made, client, capsys, task, text, flags, settings
):
    picture = made / "photos/wide.png"
    line = f"--ckpt {made}/ck --device cpu --beams 1 --image {picture} --task {task} --json {flags}"
    sample.main([*shlex.split(line), "--prompt", text])
    expected = json.loads(capsys.readouterr().out)["answer"]
    answer = create(client, message(text, picture), extra_body={"task": task}, **settings)
    assert said(answer) == expected != ""
    stream = create(
        client, message(text, picture), extra_body={"task": task}, stream=True, **settings
    )
    pieces = [chunk.choices[0].delta.content for chunk in stream]
    assert "".join(pieces) == expected and len(pieces) > 2


def test_several_pictures_and_turns_are_asked_as_they_were_trained(made, server, client):
    model, tokenizer = server.talk.model, server.talk.tokenizer
    paths = [made / "photos/wide.png", made / "photos/tall.png"]
    images = [Image.open(path).convert("RGB") for path in paths]
    mark = model.config.image_mark

    def expected(images, turns):
        ids, _ = encode_turns(tokenizer, turns, model.config.visual_tokens)
        return sample.generate(model, tokenizer, [images], [ids], pad=True, max_new_tokens=8)[0]

    turn = prompt("chat", f"{mark}\n{mark}\nwhich?", "")
    both = said(create(client, message("which?", *paths), max_tokens=8))
    assert both == expected(images, [(turn, None)])
    assert both != said(create(client, message("which?", *paths[::-1]), max_tokens=8))
    later = [(prompt("chat", "hello", ""), "hi"), (chat_turn(f"{mark}\nwhich?"), None)]
    answer = {"role": "assistant", "content": "hi"}
    asked = (message("hello"), answer, message("which?", paths[1]))
    assert said(create(client, *asked, max_tokens=8)) == expected(images[1:], later)


def test_a_second_turn_is_that_of_a_chat(made, server, client, monkeypatch):
    picture = made / "photos/wide.png"
    talk = sample.Chat(server.talk.model, server.talk.tokenizer, Image.open(picture).convert("RGB"))
    first = "it is red"
    ids = [torch.tensor(i) for i in talk.tokenizer.encode(first)]
    with monkeypatch.context() as patch:
        patch.setattr(sample, "decode", lambda *_, **__: iter(ids))
        assert "".join(talk.ask("what?")) == first
    second = "".join(talk.ask("and now?", max_new_tokens=8))
    before = {"role": "assistant", "content": first}
    answer = create(client, message("what?", picture), before, message("and now?"), max_tokens=8)
    assert said(answer) == second


def test_why_an_answer_ends_and_how_long_it_is(server, client, monkeypatch):
    answer = create(client, message("hello"), max_tokens=5)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    pieces = ["one t", "wo ", "three", " four"]
    monkeypatch.setattr(server.talk, "answer", lambda *_, **__: iter(pieces))
    answer = create(client, message("hello"))
    assert (said(answer), answer.choices[0].finish_reason) == ("one two three four", "stop")
    for stop, expected in (
        ("two", "one "),
        (["threefold", "ee f"], "one two thr"),
        (["wo th", "e t"], "on"),
        (["four!", "fours"], "one two three four"),
        (["two", "ne tw"], "o"),
    ):
        stream = create(client, message("hello"), stop=stop, stream=True)
        chunks = [chunk.choices[0] for chunk in stream]
        assert "".join(chunk.delta.content for chunk in chunks) == expected
        assert chunks[-1].finish_reason == "stop"


def test_what_is_wrong_is_said_in_the_shape_that_openais_client_knows(made, client):
    with pytest.raises(openai.BadRequestError, match="cannot be read as an image") as raised:
        create(client, message("hello", made / "broken.png"))
    assert " at 0x" not in str(raised.value)
    with pytest.raises(openai.BadRequestError, match="context is 300"):
        create(client, message("far too long " * 100))
    with pytest.raises(openai.NotFoundError, match="only ck answers"):
        client.chat.completions.create(model="other", messages=[message("hello")])
    assert [model.id for model in client.models.list()] == ["ck"]


# ---- requests that are refused ---------------------------------------------------------------------------------------


def request(server, body=None, path="/v1/chat/completions", **headers):
    """-> (status, headers, what was said)"""
    port = server.server_address[1]
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, body, headers)
    response = connection.getresponse()
    try:
        return response.status, response.headers, response.read().decode(errors="replace")
    finally:
        connection.close()


def wrong(content):
    return {"messages": [{"role": "user", "content": content}]}


def shown(address):
    return wrong([{"type": "image_url", "image_url": {"url": address}}])


HELLO = wrong("hello")
TURNS = [*HELLO["messages"], {"role": "assistant", "content": "hi"}]
HEAD = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)  # 30,000 x 30,000 in RGB
BOMB = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + HEAD + struct.pack(">I", zlib.crc32(HEAD))
BOMB += struct.pack(">I4sI", 0, b"IDAT", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize(
    "body, names",
    [
        (b"", "no JSON object"),
        (b"[" * 100_000, "no JSON object"),
        (b'{"messages": \xff}', "no JSON object"),
        ([1], "no JSON object"),
        ({}, "last one must be the user's"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "system", "content": "be brief"}]}, "system prompt"),
        ({"messages": [*HELLO["messages"]] * 2}, "messages[1]"),
        ({"messages": TURNS}, "last one must be the user's"),
        (wrong([{"type": "input_audio"}]), "a part that is"),
        (wrong("<ImageHere>"), "reserved mark"),
        (wrong("\ud800"), "UTF-8"),
        (wrong("word " * 30_000), "100000 characters"),
        (
            wrong([{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}] * 9),
            "8 pict",
        ),
        (shown("http://127.0.0.1:1/x.png"), "no address is fetched"),
        (shown("file:///etc/passwd"), "no address is fetched"),
        (shown("/etc/passwd"), "no address is fetched"),
        (shown("data:image/png;base64,%%%"), "no data URL"),
        (shown("data:image/png;base64," + base64.b64encode(BOMB).decode()), "pixels"),
        (HELLO | {"temperature": -1}, "temperature"),
        (HELLO | {"temperature": "<b>"}, "temperature"),
        (HELLO | {"top_p": 0}, "top_p"),
        (HELLO | {"max_tokens": True}, "max_tokens"),
        (HELLO | {"max_tokens": 10**30}, "max_tokens"),
        (HELLO | {"seed": 0.5}, "seed"),
        (HELLO | {"stop": {"a": 1}}, "stop"),
        (HELLO | {"stop": ["a" * 2000]}, "stop"),
        ({"messages": (TURNS * 2000)[:-1]}, "context is 300"),
        (HELLO | {"stream": "yes"}, "stream"),
        (HELLO | {"tools": [{}]}, "tools"),
        (HELLO | {"n": 2}, "n:"),
        (HELLO | {"task": "dance"}, "task"),
        (HELLO | {"task": "ground"}, "one picture"),
    ],
)
def test_a_wrong_request_is_a_400_that_says_why(server, body, names):
    status, headers, text = request(server, body)
    assert status == 400, text
    assert names in json.loads(text)["error"]["message"]
    assert headers["Content-Type"] == "application/json"
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_what_asks_for_nothing_is_taken(server):
    extra = {
        "n": 1,
        "presence_penalty": 0,
        "logprobs": False,
        "tools": [],
        "user": "me",
        "seed": None,
    }
    assert request(server, HELLO | extra | {"max_tokens": 2})[0] == 200


# ---- the line --------------------------------------------------------------------------------------------------------


def until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


@pytest.fixture
def slow(server, monkeypatch):
    """Answers go on until the event is set."""
    done = threading.Event()

    def answer(ids, *_, **__):
        server.talk.ids = ids
        while not done.is_set():
            time.sleep(0.01)
            yield "word "

    monkeypatch.setattr(server.talk, "answer", answer)
    yield done
    done.set()
    until(lambda: not server.waiting)


def begin(server, **settings):
    """A request on its way -> its connection"""
    connection = HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.request("POST", "/v1/chat/completions", json.dumps(HELLO | settings))
    return connection


def test_a_full_line_is_a_429_and_who_leaves_makes_room(server, slow):
    clients = []
    for n in range(1 + serve.QUEUE):
        clients.append(begin(server))
        until(lambda n=n: len(server.waiting) == n + 1)
    status, headers, _ = request(server, HELLO)
    assert status == 429 and int(headers["Retry-After"]) > 0
    clients.pop(4).close()  # one that waits
    until(lambda: len(server.waiting) == serve.QUEUE)
    clients.pop(0).close()  # the one whose answer is under way
    until(lambda: len(server.waiting) == serve.QUEUE - 1)
    slow.set()
    assert [client.getresponse().status for client in clients] == [200] * len(clients)


def test_a_stream_that_is_left_ends_the_answer(server, slow):
    with begin(server, stream=True).getresponse() as response:
        assert b"word" in response.readline()
    until(lambda: not server.waiting)


def crowd(port, seconds, clients=16):
    """Many clients that ask for so long -> the statuses, and {question: its answers}"""
    statuses, answers = [], {}
    end = time.monotonic() + seconds

    def ask(n):
        while time.monotonic() < end:
            text = f"question {n % 5}"
            connection = HTTPConnection("127.0.0.1", port, timeout=60)
            body = wrong(text) | {"max_tokens": 12}
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            response = connection.getresponse()
            answer = json.loads(response.read())
            statuses.append(response.status)
            if response.status == 200:
                answers.setdefault(text, set()).add(said_in(answer))
            n += 1

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, range(clients)))
    return statuses, answers


def said_in(answer):
    return answer["choices"][0]["message"]["content"]


def alone(server, text):
    return said_in(json.loads(request(server, wrong(text) | {"max_tokens": 12})[2]))


def test_sixteen_clients_get_the_answers_that_each_would_get_alone(server):
    statuses, answers = crowd(server.server_address[1], 2)
    assert set(statuses) == {200, 429}
    assert answers == {text: {alone(server, text)} for text in answers} and len(answers) == 5


def resident(pid):
    """Bytes of memory"""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def command(folder):
    """python serve.py in a process of its own -> (process, port); Ctrl-C at the end."""
    (folder / "said.txt").unlink(missing_ok=True)
    words = ["serve.py", "--ckpt", str(folder / "ck"), "--device", "cpu", "--port", "0"]
    process = tiny.context().Process(target=tiny.command, args=(folder, words))
    process.start()
    until(lambda: "answers at" in tiny.said(folder), 120)
    yield process, int(re.search(r"ck answers at http://127.0.0.1:(\d+)\n", tiny.said(folder))[1])
    os.kill(process.pid, signal.SIGINT)
    assert tiny.finish([process], 20) == [0]
    assert tiny.said(folder).count("\n") == 1, "no traceback"


@pytest.mark.slow
def test_sixteen_clients_for_a_minute_take_no_more_memory_than_for_a_quarter(made, server):
    with command(made) as (process, port):
        crowd(port, 15)
        before = resident(process.pid)
        statuses, answers = crowd(port, 60)
        grown = resident(process.pid) - before
    assert set(statuses) == {200, 429}
    assert answers == {text: {alone(server, text)} for text in answers}
    assert grown < 2**24


def test_ctrl_c_ends_it_in_the_midst_of_an_answer(made):
    with command(made) as (_, port):
        waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        asked = HTTPConnection("127.0.0.1", port)
        body = wrong("hello") | {"stream": True}
        asked.request("POST", "/v1/chat/completions", json.dumps(body))
        assert asked.getresponse().status == 200
    for connection in waiting:
        connection.close()


# ---- attacks ---------------------------------------------------------------------------------------------------------


def raw(server, *parts, pause=0.0):
    """What comes back for these bytes, after which nothing more is sent."""
    with socket.create_connection(("127.0.0.1", server.server_address[1]), 20) as connection:
        with contextlib.suppress(OSError):
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            connection.shutdown(socket.SHUT_WR)
        said = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(2**16):
                said += piece
    return said


POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
GET = b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY = json.dumps(HELLO | {"max_tokens": 2}).encode()


def length(n):
    return b"Content-Length: %b\r\n\r\n" % str(n).encode()


ATTACKS = {
    "up and out": (GET % b"/../../../../etc/passwd", 404),
    "up and out, encoded": (GET % b"/scenes/%2e%2e/%2e%2e/serve.py", 404),
    "two slashes": (GET % b"//etc/passwd", 404),
    "backslashes": (GET % rb"/scenes\..\..\serve.py", 404),
    "the page's own file": (GET % b"/support/page.html", 404),
    "a scene that is not offered": (GET % b"/scenes/9", 404),
    "a scene below zero": (GET % b"/scenes/-1", 404),
    "a scene with a path": (GET % b"/scenes/1/../../serve.py", 404),
    "a zero byte": (GET % b"/scenes/1\x00.png", 404),
    "another server's address": (GET % b"http://example.com/", 404),
    "another method": (b"DELETE / HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
    "a preflight": (b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
    "a posted page": (b"POST / HTTP/1.1\r\nHost: localhost\r\n" + length(2) + b"{}", 404),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
    "half a request line": (b"GET / HT", 400),
    "half a header": (b"GET / HTTP/1.1\r\nHos", 403),
    "a long request line": (GET % (b"/" + b"a" * 70_000), 414),
    "a long header": (
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        431,
    ),
    "many headers": (b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 200 + b"\r\n", 431),
    "no length": (POST + b"\r\n" + BODY, 411),
    "chunks": (POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", 411),
    "a length below zero": (POST + length(-5) + BODY, 411),
    "a length in words": (POST + length("ten") + BODY, 411),
    "a length beyond all": (POST + length(10**12) + BODY, 413),
    "a length of a hundred digits": (POST + length("9" * 100) + BODY, 411),
    "a body that is too long": (POST + length(2**24 + 1) + b" " * (2**24 + 1), 413),
    "half a body": (POST + length(len(BODY)) + BODY[:20], 400),
    "a body that lacks a space": (POST + length(len(BODY) + 1) + BODY, 400),
    "a length that is too short": (POST + length(len(BODY) - 5) + BODY, 400),
    "a foreign page": (POST + b"Origin: https://evil.example\r\n" + length(len(BODY)) + BODY, 403),
    "a page without an origin": (POST + b"Origin: null\r\n" + length(len(BODY)) + BODY, 403),
    "a foreign page of a like name": (
        POST + b"Origin: http://localhost.evil.example\r\n" + length(len(BODY)) + BODY,
        403,
    ),
    "a name bound to this address": (
        b"GET /health HTTP/1.1\r\nHost: evil.example:8000\r\n\r\n",
        403,
    ),
    "a name that begins well": (
        b"GET /health HTTP/1.1\r\nHost: 127.0.0.1.evil.example\r\n\r\n",
        403,
    ),
    "no name": (b"GET /health HTTP/1.1\r\n\r\n", 403),
    "HTML in a header": (b"GET /<script>alert(1)</script> HTTP/9<b>\r\n\r\n", 400),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_gets_a_clear_status_and_the_server_goes_on(server, made, name):
    sent, status = ATTACKS[name]
    answer = raw(server, sent)
    assert answer.startswith(b"HTTP/1.0 %d " % status), answer[:200]
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Content-Type: application/json" in head and b"Python" not in head
    assert json.loads(body)["error"]["message"]
    for leak in (b"root:", b"import ", b"Traceback", bytes(made), bytes(tiny.ROOT)):
        assert leak not in answer
    assert request(server, BODY)[0] == 200


def test_its_own_page_may_ask(server):
    port = server.server_address[1]
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "192.168.0.7"):
        status, _, _ = request(server, BODY, Host=host, Origin=f"http://{host}")
        assert status == 200
    assert request(server, BODY, Origin="http://localhost:1")[0] == 403


def test_a_slow_sender_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(serve, "SENDING", 0.3)
    began = time.monotonic()
    header = raw(server, POST, *[b"X"] * 1000, pause=0.05)
    assert header == b"" or header.startswith(b"HTTP/1.0 4")
    body = raw(server, POST + length(5000), *[b" "] * 1000, pause=0.05)
    assert body == b"" or (body.startswith(b"HTTP/1.0 400 ") and b"of the 5000" in body)
    assert time.monotonic() - began < 30, "a drop each 50 ms is 100 s"
    until(lambda: not server.deadlines)


def test_more_connections_than_there_is_room_for_are_told_to_come_again(server, monkeypatch):
    until(lambda: not server.deadlines)
    monkeypatch.setattr(serve, "CONNECTIONS", 2)
    address = ("127.0.0.1", server.server_address[1])
    with socket.create_connection(address), socket.create_connection(address):
        until(lambda: len(server.deadlines) == 2)
        assert raw(server).startswith(b"HTTP/1.0 429 ")
    until(lambda: not server.deadlines)
    assert request(server, path="/health")[0] == 200


def test_a_fault_of_the_server_itself_says_nothing_of_it(server, monkeypatch, capsys):
    def broken(*_, **__):
        yield "one"
        raise KeyError("a secret")

    monkeypatch.setattr(server.talk, "answer", broken)
    status, _, text = request(server, BODY)
    assert status == 500 and "secret" not in text
    status, _, text = request(server, HELLO | {"stream": True})
    assert status == 200 and '"error"' in text and "secret" not in text
    assert "a secret" in capsys.readouterr().err
    monkeypatch.undo()
    assert request(server, BODY)[0] == 200


def test_the_page_and_its_scenes(server):
    status, headers, page = request(server, path="/")
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", policy)[1]
    assert page.count(f'nonce="{nonce}"') == 2 == page.count("nonce=")
    assert "innerHTML" not in page and "http" not in page.replace("http-equiv", "")
    assert page.count("\n") < 400 and f"SCENES = {serve.SCENES};" in page
    for n in range(serve.SCENES):
        assert request(server, path=f"/scenes/{n}")[1]["Content-Type"] == "image/png"


def test_a_port_that_is_taken_is_one_sentence(made, server, capsys):
    port = server.server_address[1]
    argv = ["--ckpt", str(made / "ck"), "--device", "cpu", "--port", str(port)]
    assert run(lambda: serve.main(argv)) == 2
    assert f"127.0.0.1:{port}" in capsys.readouterr().err
