"""DINOv3, SigLIP, C-RADIO and CLIP with random weights against their equations in float64:
normalisation, position, which tokens, and which layer."""

import json

import pytest
import torch
import transformers
from torch.nn import functional as F

from occfeat_targets.store.settings import ConfigError
from occfeat_targets.teachers import load_teacher
from occfeat_targets.teachers.base import TeacherError, TeacherSettings, describe

HEADS, PATCH, SIZE = 2, 16, (48, 80)  # 3 x 5 tokens
MEAN, STD = [0.43, 0.411, 0.296], [0.213, 0.156, 0.143]  # DINOv3's for satellite images
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "image_size": 64,
    "patch_size": PATCH,
}


def dinov3():
    config = transformers.DINOv3ViTConfig(**SHAPE, num_register_tokens=4, key_bias=False)
    return transformers.DINOv3ViTModel(config)


def siglip():
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SHAPE))


def radio():
    if not hasattr(transformers, "RadioModel"):
        pytest.skip("this transformers has no C-RADIO")
    shape = {k: v for k, v in SHAPE.items() if k not in ("image_size", "intermediate_size")}
    config = transformers.RadioConfig(
        **shape, max_img_size=128, mlp_ratio=1.5, summary_idxs=[0], norm_mean=MEAN, norm_std=STD
    )
    return transformers.RadioModel(config)


def clip():
    text, to = {"num_hidden_layers": 1, "hidden_size": 32}, {"projection_dim": 24}
    parts = {"vision_config": SHAPE | to, "text_config": text | to}
    return transformers.CLIPModel(transformers.CLIPConfig(**parts, **to))


def filled(model):
    """No weight at its initial 0 or 1, where a missing term would not show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


class ByHand:
    """The blocks that these models share, by the names of each."""

    def __init__(self, model, eps):
        self.w = {name: value.double() for name, value in model.state_dict().items()}
        self.eps = eps

    def linear(self, x, name):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def patches(self, pixels, mean=MEAN, std=STD):
        mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (mean, std))
        return F.unfold((pixels.double() - mean) / std, PATCH, stride=PATCH).transpose(1, 2)

    def attention(self, x, names, turn=lambda heads: heads):
        q, k, v = (
            self.linear(x, name).unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in names[:3]
        )
        q, k = turn(q), turn(k)
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        return self.linear((weights @ v).transpose(1, 2).flatten(2), names[3])


def dinov3_by_hand(model, pixels):
    """Positions turn queries and keys of patches: angles of their centres' coordinates in -1..1."""
    m = ByHand(model, model.config.layer_norm_eps)
    kernel = m.w["embeddings.patch_embeddings.weight"].flatten(1)
    x = m.patches(pixels) @ kernel.T + m.w["embeddings.patch_embeddings.bias"]
    first = [m.w["embeddings.cls_token"], m.w["embeddings.register_tokens"]]
    x = torch.cat([*(t.expand(len(x), -1, -1) for t in first), x], dim=1)
    h, w, quarter = SIZE[0] // PATCH, SIZE[1] // PATCH, 32 // HEADS // 4
    periods = model.config.rope_theta ** (torch.arange(quarter).double() / quarter)
    rows, columns = ((2 * torch.arange(n).double() + 1) / n - 1 for n in (h, w))
    y, x_ = torch.meshgrid(rows, columns, indexing="ij")
    angles = torch.cat([2 * torch.pi * p[..., None] / periods for p in (y, x_)], -1).flatten(0, 1)

    def turn(heads):
        prefix, patches = heads[..., :5, :], heads[..., 5:, :]
        a, b = patches.chunk(2, dim=-1)  # complex numbers, turned by the angles
        turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([prefix, torch.cat([turned.real, turned.imag], -1)], dim=-2)

    at = "model.layer" if "model.layer.0.norm1.weight" in m.w else "layer"
    for i in range(2):
        names = [f"{at}.{i}.attention.{n}_proj" for n in "qkvo"]
        y = m.attention(m.norm(x, f"{at}.{i}.norm1"), names, turn)
        x = x + y * m.w[f"{at}.{i}.layer_scale1.lambda1"]
        y = F.gelu(m.linear(m.norm(x, f"{at}.{i}.norm2"), f"{at}.{i}.mlp.up_proj"))
        x = x + m.linear(y, f"{at}.{i}.mlp.down_proj") * m.w[f"{at}.{i}.layer_scale2.lambda1"]
    return x[:, 5:], m.norm(x, "norm")[:, 5:]


def siglip_by_hand(model, pixels):
    m = ByHand(model, model.config.layer_norm_eps)
    prefix = "" if "post_layernorm.weight" in m.w else "vision_model."
    kernel = m.w[f"{prefix}embeddings.patch_embedding.weight"].flatten(1)
    x = m.patches(pixels) @ kernel.T + m.w[f"{prefix}embeddings.patch_embedding.bias"]
    table = m.w[f"{prefix}embeddings.position_embedding.weight"].view(1, 4, 4, 32)
    stretched = F.interpolate(table.permute(0, 3, 1, 2), (3, 5), mode="bicubic")
    x = x + stretched.flatten(2).transpose(1, 2)
    for i in range(2):
        at = f"{prefix}encoder.layers.{i}"
        names = [f"{at}.self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "out_proj")]
        x = x + m.attention(m.norm(x, f"{at}.layer_norm1"), names)
        y = m.linear(m.norm(x, f"{at}.layer_norm2"), f"{at}.mlp.fc1")
        x = x + m.linear(F.gelu(y, approximate="tanh"), f"{at}.mlp.fc2")
    return x, m.norm(x, f"{prefix}post_layernorm")


def radio_by_hand(model, pixels):
    """Positions are a square as long as the longer side, of which the upper left is cut out."""
    m = ByHand(model, model.config.layer_norm_eps)
    x = m.linear(m.patches(pixels), "embeddings.patch_projection")
    table = m.w["embeddings.position_embedding"].view(1, 8, 8, 32).permute(0, 3, 1, 2)
    square = F.interpolate(table, (5, 5), mode="bilinear", align_corners=False)
    x = x + square[:, :, :3].flatten(2).transpose(1, 2)
    first = m.w["embeddings.cls_register_token"]
    x = torch.cat([first.expand(len(x), -1, -1), x], dim=1)
    for i in range(2):
        at = f"encoder.layer.{i}"
        names = [f"{at}.attention.{n}_proj" for n in "qkvo"]
        y = m.attention(m.norm(x, f"{at}.norm1"), names)
        x = x + y * m.w[f"{at}.layer_scale1.lambda1"]
        y = m.linear(F.gelu(m.linear(m.norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")), f"{at}.mlp.fc2")
        x = x + y * m.w[f"{at}.layer_scale2.lambda1"]
    return x[:, len(first) :], x[:, len(first) :]


def clip_by_hand(model, pixels):
    """MaskCLIP: no patch looks at another in the last block, whose value and MLP it keeps."""
    m = ByHand(model, model.config.vision_config.layer_norm_eps)
    at = "vision_model.embeddings"
    x = m.patches(pixels) @ m.w[f"{at}.patch_embedding.weight"].flatten(1).T
    table = m.w[f"{at}.position_embedding.weight"]
    square = table[1:].view(1, 4, 4, 32).permute(0, 3, 1, 2)
    x = x + F.interpolate(square, (3, 5), mode="bicubic").flatten(2).transpose(1, 2)
    first = (m.w[f"{at}.class_embedding"] + table[0]).expand(len(x), 1, -1)
    x = m.norm(torch.cat([first, x], dim=1), "vision_model.pre_layrnorm")
    for i in range(2):
        at = f"vision_model.encoder.layers.{i}"
        q, k, v, out = (f"{at}.self_attn.{n}_proj" for n in ("q", "k", "v", "out"))
        y = m.norm(x, f"{at}.layer_norm1")
        x = x + (m.attention(y, (q, k, v, out)) if i == 0 else m.linear(m.linear(y, v), out))
        y = m.linear(m.norm(x, f"{at}.layer_norm2"), f"{at}.mlp.fc1")
        x = x + m.linear(y * torch.sigmoid(1.702 * y), f"{at}.mlp.fc2")
    return m.linear(m.norm(x, "vision_model.post_layernorm"), "visual_projection")[:, 1:]


def saved(tmp_path, make):
    model = filled(make())
    model.save_pretrained(tmp_path)
    said = {"image_mean": MEAN, "image_std": STD}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    return model, TeacherSettings(name=str(tmp_path), precision="float32")


@pytest.mark.parametrize("layer", ["last", "before_norm"])
@pytest.mark.parametrize(
    ("make", "by_hand"),
    [(dinov3, dinov3_by_hand), (siglip, siglip_by_hand), (radio, radio_by_hand)],
)
def test_tokens_are_those_computed_by_hand(tmp_path, make, by_hand, layer):
    model, settings = saved(tmp_path, make)
    settings = settings.with_(layer=layer)
    if (make, layer) == (radio, "before_norm"):
        with pytest.raises(ConfigError, match="radio model has no final norm"):
            load_teacher(settings)
        return
    pixels = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    teacher = load_teacher(settings)
    with torch.no_grad():
        wanted = by_hand(model, pixels)[layer == "last"]
    tokens = teacher(pixels).flatten(2).transpose(1, 2).double()
    assert tokens.std() > 0.1
    torch.testing.assert_close(tokens, wanted, atol=1e-4, rtol=1e-4)
    described = describe(teacher, settings)
    assert (described["patch_size"], described["input_size"]) == (PATCH, [288, 512])
    assert (layer == "last") != ("before" in described["layer"])


def test_clip_gives_patches_in_the_space_of_texts(tmp_path):
    model, settings = saved(tmp_path, clip)
    pixels = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    teacher = load_teacher(settings)
    with torch.no_grad():
        wanted = clip_by_hand(model, pixels)
        own = model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True)[0]
        mixed = model.visual_projection(model.vision_model.post_layernorm(own))[:, 1:]
    tokens = teacher(pixels).flatten(2).transpose(1, 2).double()
    torch.testing.assert_close(tokens, wanted, atol=1e-4, rtol=1e-4)
    assert (tokens - mixed).abs().mean() > 0.1 * tokens.std()  # CLIP's own patches are others
    described = describe(teacher, settings)
    assert (described["dim"], described["patch_size"]) == (24, PATCH)
    assert "MaskCLIP" in described["layer"]
    with pytest.raises(ConfigError, match="before_norm"):
        load_teacher(settings.with_(layer="before_norm"))


@pytest.mark.parametrize("content", [None, "{}", '{"image_mean": [1, 2, 3], "image_std": 1}'])
def test_a_checkpoint_that_hides_its_normalisation_is_refused(tmp_path, content):
    _, settings = saved(tmp_path, dinov3)
    file = tmp_path / "preprocessor_config.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(TeacherError, match=r"preprocessor_config\.json"):
        load_teacher(settings)
