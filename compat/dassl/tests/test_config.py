import pytest
from dassl.config import clean_cfg, get_cfg_default
from dassl.config.defaults import _C
from yacs.config import CfgNode as CN

# Values that third-party yaml files and printed configurations rely on.
DEFAULTS = {
    "VERSION": 1,
    "OUTPUT_DIR": "./output",
    "RESUME": "",
    "SEED": -1,
    "USE_CUDA": True,
    "VERBOSE": True,
    "INPUT.SIZE": (224, 224),
    "INPUT.INTERPOLATION": "bilinear",
    "INPUT.TRANSFORMS": (),
    "INPUT.PIXEL_MEAN": [0.485, 0.456, 0.406],
    "INPUT.PIXEL_STD": [0.229, 0.224, 0.225],
    "INPUT.RRCROP_SCALE": (0.08, 1.0),
    "INPUT.GB_K": 21,
    "DATASET.NUM_SHOTS": -1,
    "DATASET.VAL_PERCENT": 0.1,
    "DATALOADER.NUM_WORKERS": 4,
    "DATALOADER.TRAIN_X.BATCH_SIZE": 32,
    "DATALOADER.TRAIN_X.N_INS": 16,
    "DATALOADER.TRAIN_U.SAME_AS_X": True,
    "DATALOADER.TEST.SAMPLER": "SequentialSampler",
    "MODEL.HEAD.BN": True,
    "OPTIM.NAME": "adam",
    "OPTIM.LR": 0.0003,
    "OPTIM.SGD_DAMPNING": 0,
    "OPTIM.STEPSIZE": (-1,),
    "OPTIM.WARMUP_EPOCH": -1,
    "OPTIM.WARMUP_RECOUNT": True,
    "TRAIN.CHECKPOINT_FREQ": 0,
    "TRAIN.PRINT_FREQ": 10,
    "TRAIN.COUNT_ITER": "train_x",
    "TEST.FINAL_MODEL": "last_step",
    "TRAINER.NAME": "",
    "TRAINER.CDAC.RAMPUP_ITRS": 1000,
    "TRAINER.DDAIG.CLAMP_MIN": -1.0,
    "TRAINER.FIXMATCH.CONF_THRE": 0.95,
}
# The keys of each node.
KEYS = {
    "INPUT": 21,
    "DATASET": 11,
    "DATALOADER": 6,
    "DATALOADER.TRAIN_X": 4,
    "DATALOADER.TRAIN_U": 5,
    "DATALOADER.TEST": 2,
    "MODEL": 3,
    "MODEL.BACKBONE": 2,
    "MODEL.HEAD": 5,
    "OPTIM": 20,
    "TRAIN": 3,
    "TEST": 6,
    "TRAINER": 15,
}


def lookup(cfg, dotted):
    for part in dotted.split("."):
        cfg = cfg[part]
    return cfg


@pytest.mark.parametrize("key", DEFAULTS)
def test_default(key):
    value = lookup(get_cfg_default(), key)
    assert value == DEFAULTS[key]
    assert type(value) is type(DEFAULTS[key])


@pytest.mark.parametrize("node", KEYS)
def test_number_of_keys(node):
    assert len(lookup(get_cfg_default(), node)) >= KEYS[node]


def test_is_a_yacs_node_and_a_copy():
    cfg = get_cfg_default()
    assert isinstance(cfg, CN) and isinstance(cfg.OPTIM, CN)
    cfg.OPTIM.LR = 7.0
    assert _C.OPTIM.LR == 0.0003


def test_third_party_nodes_and_yaml(tmp_path):
    cfg = get_cfg_default()
    cfg.TRAINER.COOP = CN()
    cfg.TRAINER.COOP.N_CTX = 16
    file = tmp_path / "vit_b16.yaml"
    file.write_text(
        'INPUT:\n  SIZE: (32, 48)\n  TRANSFORMS: ["random_flip", "normalize"]\nOPTIM:\n  LR: 0.002\n'
        "TRAINER:\n  COOP:\n    N_CTX: 4\n"
    )
    cfg.merge_from_file(str(file))
    cfg.merge_from_list(["OPTIM.STEPSIZE", "[3, 5]", "TRAIN.CHECKPOINT_FREQ", "2"])
    assert cfg.INPUT.SIZE == (32, 48)
    assert tuple(cfg.INPUT.TRANSFORMS) == ("random_flip", "normalize")
    assert cfg.TRAINER.COOP.N_CTX == 4 and cfg.OPTIM.STEPSIZE == (3, 5) and cfg.TRAIN.CHECKPOINT_FREQ == 2
    assert "COOP" not in _C.TRAINER


def test_unknown_key_is_named():
    with pytest.raises(KeyError, match="LEARNING_RATE"):
        get_cfg_default().merge_from_other_cfg(CN({"OPTIM": {"LEARNING_RATE": 1.0}}))
    with pytest.raises(AssertionError, match="key"):
        get_cfg_default().merge_from_list(["OPTIM.LEARNING_RATE", 1.0])


def test_clean_cfg():
    cfg = get_cfg_default()
    cfg.TRAINER.MAPLE = CN({"N_CTX": 2})
    clean_cfg(cfg, "MaPLe")
    assert set(cfg.TRAINER) == {"NAME", "MAPLE"}


def test_dump_round_trip():
    cfg = get_cfg_default()
    again = get_cfg_default()
    again.merge_from_other_cfg(CN.load_cfg(cfg.dump()))
    assert str(again) == str(cfg)
