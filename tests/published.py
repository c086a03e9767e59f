"""The paper's sets as their authors publish them, two or three records each, at the places that recipes/ names."""

import pickle

from small import picture, write

WIDE = (200, 100)  # of every picture
TEN = ["red"] * 6 + ["dark red"] * 4  # as ten people answered


def write_sets(data):
    coco(data)
    textvqa(data)
    gqa(data)
    ocrvqa(data)
    for name, by in (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")):
        refer(data, name, by)
    visual_genome(data)


def pictures(folder, *names):
    for name in names:
        write(folder / name, picture(size=WIDE))


def coco(data):
    """COCO's captions, and the questions that are asked about its pictures."""
    for year, part in ((2014, "train"), (2014, "val"), (2015, "test")):
        name = f"COCO_{part}{year}_000000000009.jpg"
        pictures(data / f"coco/{part}{year}", name)
        info = {"info": {}, "data_type": "mscoco", "data_subtype": f"{part}{year}"}
        asked = {"question_id": 90, "image_id": 9, "question": "What colour is it?"}
        said = [{"answer_id": n, "answer": answer} for n, answer in enumerate(TEN, 1)]
        answered = {"question_id": 90, "image_id": 9, "answers": said, "answer_type": "other"}
        vqav2 = data / f"vqav2/v2_OpenEnded_mscoco_{part}{year}_questions.json"
        if part == "test":
            vqav2 = data / "vqav2/v2_OpenEnded_mscoco_test-dev2015_questions.json"
        write(vqav2, {**info, "questions": [asked]})
        write(
            data / f"vqav2/v2_mscoco_{part}{year}_annotations.json",
            {**info, "annotations": [answered]},
        )
        write(
            data / f"okvqa/OpenEnded_mscoco_{part}{year}_questions.json",
            {**info, "questions": [asked]},
        )
        write(
            data / f"okvqa/mscoco_{part}{year}_annotations.json",
            {**info, "annotations": [answered]},
        )
    captions = [{"image_id": 9, "id": n, "caption": f"A blue square {n}."} for n in range(2)]
    images = [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "width": 200}]
    write(
        data / "coco/annotations/captions_train2014.json",
        {"info": {}, "images": images, "licenses": [], "annotations": captions},
    )
    pictures(data / "coco/train2017", "000000000009.jpg")
    write(
        data / "aokvqa/aokvqa_v1p0_train.json",
        [
            {
                "split": "train",
                "image_id": 9,
                "question_id": "22MexNkBPpdZGX6sxbxVBH",
                "question": "What colour is it?",
                "choices": ["red", "blue", "green", "big"],
                "correct_choice_idx": 0,
                "direct_answers": TEN,
                "difficult_direct_answer": False,
                "rationales": ["It looks red."] * 3,
            }
        ],
    )


def textvqa(data):
    pictures(data / "textvqa/train_images", "0054c91397f2fe05.jpg")
    for part in ("train", "val"):
        asked = {
            "question": "What does it say?",
            "image_id": "0054c91397f2fe05",
            "image_classes": ["Sign"],
            "image_width": 200,
            "question_tokens": ["what", "does", "it", "say"],
            "question_id": 0,
            "answers": TEN,
            "set_name": part,
        }
        header = {"dataset_type": part, "dataset_name": "textvqa", "dataset_version": "0.5.1"}
        write(data / f"textvqa/TextVQA_0.5.1_{part}.json", {**header, "data": [asked]})
        captions = ["A sign says Stop!", "A red sign."]
        rows = [
            {
                "image_id": "0054c91397f2fe05",
                "caption_id": n,
                "caption_str": caption,
                "reference_strs": captions,
                "caption_tokens": [],
            }
            for n, caption in enumerate(captions)
        ]
        write(data / f"textcaps/TextCaps_0.1_{part}.json", {"dataset_type": part, "data": rows})


def gqa(data):
    pictures(data / "gqa/images", "2405722.jpg", "n578239.jpg")
    questions = {
        "02930152": {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
            "entailed": ["02930160"],
            "equivalent": ["02930152"],
            "question": "Is the sky dark?",
            "imageId": "2405722",
            "isBalanced": True,
            "groups": {"global": None, "local": "06-sky_dark"},
            "answer": "yes",
            "annotations": {"answer": {}, "question": {"2": "2486325"}},
            "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
            "fullAnswer": "Yes, the sky is dark.",
        },
        "07333408": {
            "question": "What is on the wall?",
            "imageId": "n578239",
            "answer": "a sign",
            "types": {"detailed": "relS", "semantic": "rel", "structural": "query"},
        },
    }
    for name in ("train_balanced", "testdev_balanced"):
        write(data / f"gqa/{name}_questions.json", questions)


def ocrvqa(data):
    pictures(data / "ocr_vqa/images", "0002005395.jpg", "1401604307.png")
    asked = ["Who wrote this book?", "What is the title of this book?"]
    books = {
        "0002005395": {
            "imageURL": "http://ecx.images-amazon.com/images/I/51I7d7AxAhL.jpg",
            "questions": asked,
            "answers": ["Ray Bradbury", "Dandelion Wine"],
            "title": "Dandelion Wine",
            "authorName": "Ray Bradbury",
            "genre": "Novels",
            "split": 1,
        },
        "1401604307": {
            "imageURL": "http://ecx.images-amazon.com/images/I/61Q2.png",
            "questions": asked,
            "answers": ["", "Maps"],  # some have no answer
            "split": 3,
        },
    }
    write(data / "ocr_vqa/dataset.json", books)


def refs(name="COCO_train2014_000000000009"):
    """Plain lists, dicts, texts and numbers."""
    sentences = [
        {
            "tokens": ["the", "red", "one"],
            "raw": "The RED one",
            "sent_id": 11,
            "sent": "the red one",
        },
        {"tokens": ["left"], "raw": "left", "sent_id": 12, "sent": "left"},
    ]
    parts = ("train", "testA", "testB", "testAB", "val", "test")
    return [
        {
            "ref_id": n,
            "ann_id": 1719310 + n,
            "image_id": 9,
            "category_id": 1,
            "split": part,
            "file_name": f"{name}_{n}.jpg",  # the ref's number, and no picture's name
            "sentences": sentences,
            "sent_ids": [11, 12],
        }
        for n, part in enumerate(parts)
    ]


def refer(data, name="refcoco", by="unc"):
    picture_name = "COCO_train2014_000000000009.jpg"
    pictures(data / "coco/train2014", picture_name)
    # the last touches the right and the lower edge
    boxes = [[24, 34, 88, 44]] * 5 + [[100.5, 50, 99.5, 50]]
    annotations = [
        {"id": 1719310 + n, "image_id": 9, "bbox": box, "segmentation": [], "category_id": 1}
        for n, box in enumerate(boxes)
    ]
    annotations.reverse()  # they are joined by id, not by place
    images = [{"id": 9, "file_name": picture_name, "height": 100, "width": 200}]
    write(
        data / name / "instances.json",
        {"info": {}, "images": images, "annotations": annotations, "categories": []},
    )
    write(data / name / f"refs({by}).p", pickle.dumps(refs(), protocol=0))  # as Python 2 wrote it


def visual_genome(data):
    pictures(data / "vg/VG_100K", "1.jpg")
    pictures(data / "vg/VG_100K_2", "2.jpg")
    region = {"x": 24, "y": 34, "width": 88, "height": 44, "phrase": "the clock is green"}
    edge = {"x": -3, "y": 50, "width": 300, "height": 60, "phrase": "the road"}  # leads out of it
    write(
        data / "vg/region_descriptions.json",
        [
            {
                "id": 1,
                "regions": [
                    {**region, "region_id": 1382, "image_id": 1},
                    {**edge, "region_id": 1383, "image_id": 1},
                ],
            },
            {"id": 2, "regions": [{**region, "region_id": 1389, "image_id": 2}]},
        ],
    )
