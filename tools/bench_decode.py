"""Generation against transformers' generate(), the same weights: picture and prompt included."""

from functools import partial

import torch

from model import IMAGE, PRESETS, LlamaConfig
from sample import generate_ids
from tools.bench_train import llava_pair
from tools.measure import Table, in_turns


def decode(args, size="toy", new=64, repeat=5):
    c = PRESETS["toy"]()
    if size == "small":  # TinyLlama behind CLIP's ViT-L
        c = PRESETS["llava-7b"]()
        c.llm = LlamaConfig(32000, 2048, 22, 32, 4, 5632, 2048)
    c.vit.image_size = 4 * c.vit.patch  # 4 x 4 patches: the toy's 16 visual tokens, without a pool
    if size != "toy":
        c.vit.layers = 2  # the picture is not what is measured
    S = c.vit.image_size
    theirs, ours = llava_pair(c.vit, c.llm, args.device)
    print(f"{size}: {new} new tokens after a picture and 20 tokens; the best of {repeat} in turns")
    table = Table("batch", "beams", "ours tokens/s", "transformers", "x", "same ids")
    for batch, beams in ((1, 1), (8, 1), (1, 5), (8, 5)):
        prompts = [
            [1, 5] + [IMAGE] * 16 + list(range(10 * b, 10 * b + 18)) for b in range(1, batch + 1)
        ]
        images = torch.randn(batch, 3, S, S, device=args.device)
        ids = torch.tensor(prompts, device=args.device)
        ids[ids == IMAGE] = theirs.config.image_token_id
        length = dict(max_new_tokens=new, min_new_tokens=new)
        generate = partial(
            theirs.generate,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=images,
            num_beams=beams,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
            **length,
        )
        sides = {
            "ours": partial(generate_ids, ours, images, prompts, beams=beams, **length),
            "transformers": generate,
        }
        same = sides["ours"]() == generate()[:, ids.shape[1] :].tolist()
        took = in_turns(sides, repeat)
        rates = [batch * new / t for t in took.values()]
        table.add(batch, beams, *rates, rates[0] / rates[1], same)
    return {"size": size, "new": new, "rows": table.rows}


def decode_small(args):
    return decode(args, size="small", new=8, repeat=2)
