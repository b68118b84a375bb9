"""`clip` in the manner of OpenAI's: a file is fetched into ~/.cache/clip, and known by its checksum."""

import hashlib
import os

import torch
from safetensors.torch import load_file

_MODELS = {"shapes": "https://example.invalid/clip/CHECKSUM/shapes.pt"}


def _download(url, root=None):
    root = root or os.path.expanduser("~/.cache/clip")
    target = os.path.join(root, os.path.basename(url))
    if os.path.isfile(target):
        with open(target, "rb") as file:
            if hashlib.sha256(file.read()).hexdigest() == url.split("/")[-2]:
                return target
    raise RuntimeError(f"{target} would be fetched from {url}")


class Clip(torch.nn.Module):
    """What a method needs of CLIP: features (n, 16) of pictures and of names, from the file's numbers."""

    def __init__(self, state):
        super().__init__()
        numbers = state["text_projection"].flatten()[: 16 * 192]
        self.visual = torch.nn.Parameter(numbers.reshape(192, 16).float(), requires_grad=False)

    def encode_image(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1) @ self.visual

    def encode_names(self, names):
        draws = [torch.Generator().manual_seed(sum(map(ord, name))) for name in names]
        return torch.stack([torch.randn(16, generator=draw) for draw in draws])


def load(name):
    return Clip(load_file(_download(_MODELS[name])))
