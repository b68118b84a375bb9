"""A trainer in the manner of MaPLe: prompts on both sides, the whole model registered, half precision."""

import os.path as osp

import torch
from clip import clip
from dassl.engine import TRAINER_REGISTRY, TrainerX
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.utils import load_checkpoint
from yacs.config import CfgNode as CN


def extend_cfg(cfg):
    cfg.TRAINER.MAPLE = CN()
    cfg.TRAINER.MAPLE.N_CTX = 2
    cfg.TRAINER.MAPLE.PREC = "fp16"


class CustomCLIP(torch.nn.Module):
    def __init__(self, names, model):
        super().__init__()
        self.ctx = torch.nn.Parameter(0.02 * torch.randn(16))
        self.proj = torch.nn.Linear(16, 16)
        self.clip = model
        self.register_buffer("token_prefix", model.encode_names(names))

    def forward(self, image, label=None):
        image_features = self.clip.encode_image(image) + self.proj(self.ctx)
        logits = (
            10 * torch.nn.functional.normalize(image_features, dim=1) @ (self.token_prefix + self.ctx).t()
        )
        return torch.nn.functional.cross_entropy(logits, label) if self.training else logits


@TRAINER_REGISTRY.register()
class MaPLe(TrainerX):
    def build_model(self):
        cfg = self.cfg
        if cfg.TRAINER.MAPLE.PREC == "fp16" and self.device.type == "cpu":
            raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'")
        path = clip._download(clip._MODELS[cfg.MODEL.BACKBONE.NAME])
        self.model = CustomCLIP(self.dm.dataset.classnames, clip.Clip(clip.load_file(path))).to(self.device)
        self.optim = build_optimizer(self.model, cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, cfg.OPTIM)
        self.register_model("MultiModalPromptLearner", self.model, self.optim, self.sched)

    def forward_backward(self, batch):
        loss = self.model(batch["img"].to(self.device), batch["label"].to(self.device))
        self.optim.zero_grad()
        loss.backward()
        self.optim.step()
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        return {"loss": loss.item()}

    def load_model(self, directory, epoch=None):
        for name in self.get_model_names():
            path = osp.join(directory, name, f"model.pth.tar-{epoch}")
            if not osp.exists(path):
                raise FileNotFoundError(f'Model not found at "{path}"')
            state = load_checkpoint(path)["state_dict"]
            del state["token_prefix"]
            self._models[name].load_state_dict(state, strict=False)
