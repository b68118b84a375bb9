"""A data set in the manner of CoOp's: reads split_zhou_OxfordPets.json, keeps its few-shot draws."""

import math
import os
import pickle

from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from dassl.utils import mkdir_if_missing, read_json


@DATASET_REGISTRY.register()
class OxfordPets(DatasetBase):
    dataset_dir = "oxford_pets"

    def __init__(self, cfg):
        folder = os.path.join(os.path.abspath(cfg.DATASET.ROOT), self.dataset_dir)
        draws = os.path.join(folder, "split_fewshot")
        mkdir_if_missing(draws)
        split = read_json(os.path.join(folder, "split_zhou_OxfordPets.json"))
        images = os.path.join(folder, "images")
        train, val, test = (
            [
                Datum(impath=os.path.join(images, path), label=int(y), classname=name)
                for path, y, name in split[part]
            ]
            for part in ("train", "val", "test")
        )
        shots = cfg.DATASET.NUM_SHOTS
        if shots >= 1:
            kept = os.path.join(draws, f"shot_{shots}-seed_{cfg.SEED}.pkl")
            if os.path.exists(kept):
                with open(kept, "rb") as file:
                    drawn = pickle.load(file)
            else:
                drawn = {"train": self.generate_fewshot_dataset(train, num_shots=shots)}
                drawn["val"] = self.generate_fewshot_dataset(val, num_shots=min(shots, 4))
                with open(kept, "wb") as file:
                    pickle.dump(drawn, file)
            train, val = drawn["train"], drawn["val"]
        labels = sorted({datum.label for datum in train})
        half = math.ceil(len(labels) / 2)
        chosen = {"all": labels, "base": labels[:half], "new": labels[half:]}[cfg.DATASET.SUBSAMPLE_CLASSES]
        train, val, test = (self.of_classes(datums, chosen) for datums in (train, val, test))
        super().__init__(train_x=train, val=val, test=test)

    @staticmethod
    def of_classes(datums, chosen):
        return [
            Datum(impath=datum.impath, label=chosen.index(datum.label), classname=datum.classname)
            for datum in datums
            if datum.label in chosen
        ]
