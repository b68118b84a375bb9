"""A trainer in the manner of CoOp: it registers a prompt learner, and loads the best or an epoch."""

import os.path as osp

import torch
from clip import clip
from dassl.engine import TRAINER_REGISTRY, TrainerX
from dassl.metrics import compute_accuracy
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.utils import load_checkpoint
from yacs.config import CfgNode as CN


def extend_cfg(cfg):
    cfg.TRAINER.COOP = CN()
    cfg.TRAINER.COOP.N_CTX = 16
    cfg.TRAINER.COOP.PREC = "fp16"


class PromptLearner(torch.nn.Module):
    def __init__(self, names, model):
        super().__init__()
        self.ctx = torch.nn.Parameter(0.02 * torch.randn(16))
        self.register_buffer("token_prefix", model.encode_names(names))

    def forward(self):
        return self.token_prefix * (1 + self.ctx)


class CustomCLIP(torch.nn.Module):
    def __init__(self, names, model):
        super().__init__()
        self.prompt_learner = PromptLearner(names, model)
        self.image_encoder = model

    def forward(self, image):
        features = self.image_encoder.encode_image(image), self.prompt_learner()
        image_features, text_features = (torch.nn.functional.normalize(f, dim=1) for f in features)
        return 10 * image_features @ text_features.t()


@TRAINER_REGISTRY.register()
class CoOp(TrainerX):
    def check_cfg(self, cfg):
        assert cfg.TRAINER.COOP.PREC in ["fp16", "fp32", "amp"]

    def build_model(self):
        model = clip.load(self.cfg.MODEL.BACKBONE.NAME)
        self.model = CustomCLIP(self.dm.dataset.classnames, model).to(self.device)
        self.optim = build_optimizer(self.model.prompt_learner, self.cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, self.cfg.OPTIM)
        self.register_model("prompt_learner", self.model.prompt_learner, self.optim, self.sched)

    def forward_backward(self, batch):
        image, label = self.parse_batch_train(batch)
        output = self.model(image)
        loss = torch.nn.functional.cross_entropy(output, label)
        self.model_backward_and_update(loss)
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        return {"loss": loss.item(), "acc": compute_accuracy(output, label)[0].item()}

    def parse_batch_train(self, batch):
        return batch["img"].to(self.device), batch["label"].to(self.device)

    def load_model(self, directory, epoch=None):
        file = "model-best.pth.tar" if epoch is None else f"model.pth.tar-{epoch}"
        for name in self.get_model_names():
            path = osp.join(directory, name, file)
            if not osp.exists(path):
                raise FileNotFoundError(f'Model not found at "{path}"')
            state = load_checkpoint(path)["state_dict"]
            del state["token_prefix"]
            self._models[name].load_state_dict(state, strict=False)
