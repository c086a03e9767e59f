"""Our models under the names of files that others publish, written out by hand."""

import torch

import weights.llama
import weights.rename


def eva(vit):
    """Our ViT as eva_vit_g.pth has it, but for what comes behind the blocks."""
    state = {"cls_token": vit.cls[None, None], "pos_embed": vit.positions[None]}
    modules = {"patch_embed.proj": vit.patch_embed}
    for number, block in enumerate(vit.blocks):
        name = f"blocks.{number}"
        attention = f"{name}.attn"
        qkv = (block.q.weight, block.k.weight, block.v.weight)
        state[f"{attention}.qkv.weight"] = torch.cat(qkv)
        state[f"{attention}.q_bias"] = block.q.bias
        state[f"{attention}.v_bias"] = block.v.bias
        modules |= {
            f"{name}.norm1": block.norm1,
            f"{attention}.proj": block.proj,
            f"{name}.norm2": block.norm2,
            f"{name}.mlp.fc1": block.fc1,
            f"{name}.mlp.fc2": block.fc2,
        }
    for name, module in modules.items():
        state[f"{name}.weight"] = module.weight
        state[f"{name}.bias"] = module.bias
    return state


@torch.no_grad()
def released(model):
    """Our model as InfMLLM was released."""
    adapter = model.adapter
    modules = {"ln_vision": adapter.norm, "pooler.mlp.0": adapter.fc1, "pooler.mlp.2": adapter.fc2}
    state = {}
    for name, module in modules.items():
        state[f"{name}.weight"] = module.weight
        state[f"{name}.bias"] = module.bias
    for key, t in eva(model.vit).items():
        state[f"visual_encoder.{key}"] = t
    llama = {ours: theirs for theirs, ours in weights.llama.LLAMA.items() if ours}
    ours = dict(model.llm.named_parameters())
    for name, (key,) in weights.rename.match(ours, llama).items():
        state[f"lm_model.{key}"] = ours[name]
    return {key: t.detach().clone() for key, t in state.items()}
