"""Every configuration key with its default.

The nodes under TRAINER belong to trainers which this package does not ship; they are kept so that a printed
or dumped configuration is the same as with the original, and old yaml files merge.
"""

from yacs.config import CfgNode

_C = CfgNode(
    {
        "VERSION": 1,
        "OUTPUT_DIR": "./output",
        # A folder to resume from; when empty, OUTPUT_DIR itself is looked at.
        "RESUME": "",
        # Negative: not seeded.
        "SEED": -1,
        "USE_CUDA": True,
        "VERBOSE": True,
        "INPUT": {
            # (height, width) of the network's input, pixels.
            "SIZE": (224, 224),
            "INTERPOLATION": "bilinear",
            # Names of the transforms; they are applied in a fixed order, whatever the order here.
            "TRANSFORMS": (),
            # True: the data set yields PIL images.
            "NO_TRANSFORM": False,
            "PIXEL_MEAN": [0.485, 0.456, 0.406],
            "PIXEL_STD": [0.229, 0.224, 0.225],
            # random_crop: padding, pixels.
            "CROP_PADDING": 4,
            # random_resized_crop: range of the cropped area, relative.
            "RRCROP_SCALE": (0.08, 1.0),
            # cutout: number and side (pixels) of the holes.
            "CUTOUT_N": 1,
            "CUTOUT_LEN": 16,
            # gaussian_noise.
            "GN_MEAN": 0.0,
            "GN_STD": 0.15,
            # randaugment: number of operations, and magnitude.
            "RANDAUGMENT_N": 2,
            "RANDAUGMENT_M": 10,
            # colorjitter: brightness, contrast, saturation, hue.
            "COLORJITTER_B": 0.4,
            "COLORJITTER_C": 0.4,
            "COLORJITTER_S": 0.4,
            "COLORJITTER_H": 0.1,
            # randomgrayscale: probability.
            "RGS_P": 0.2,
            # gaussian_blur: probability, and kernel size (pixels, odd).
            "GB_P": 0.5,
            "GB_K": 21,
        },
        "DATASET": {
            # The folder that holds the data sets.
            "ROOT": "",
            "NAME": "",
            "SOURCE_DOMAINS": (),
            "TARGET_DOMAINS": (),
            # Semi-supervised learning: number of labelled items in all.
            "NUM_LABELED": -1,
            # Labelled items a class; below 1: all.
            "NUM_SHOTS": -1,
            # Fraction of the training data used for validation where there is no such split.
            "VAL_PERCENT": 0.1,
            "STL10_FOLD": -1,
            "CIFAR_C_TYPE": "",
            "CIFAR_C_LEVEL": 1,
            "ALL_AS_UNLABELED": False,
        },
        "DATALOADER": {
            "NUM_WORKERS": 4,
            # Each training image is transformed this many times.
            "K_TRANSFORMS": 1,
            # Also yield the untransformed image, as "img0".
            "RETURN_IMG0": False,
            "TRAIN_X": {
                "SAMPLER": "RandomSampler",
                "BATCH_SIZE": 32,
                # RandomDomainSampler, SeqDomainSampler: domains a batch.
                "N_DOMAIN": 0,
                # RandomClassSampler: items a class.
                "N_INS": 16,
            },
            "TRAIN_U": {
                # True: the settings of TRAIN_X, and those below are ignored.
                "SAME_AS_X": True,
                "SAMPLER": "RandomSampler",
                "BATCH_SIZE": 32,
                "N_DOMAIN": 0,
                "N_INS": 16,
            },
            "TEST": {"SAMPLER": "SequentialSampler", "BATCH_SIZE": 32},
        },
        "MODEL": {
            # A checkpoint to initialise the weights from.
            "INIT_WEIGHTS": "",
            "BACKBONE": {"NAME": "", "PRETRAINED": True},
            "HEAD": {"NAME": "", "HIDDEN_LAYERS": (), "ACTIVATION": "relu", "BN": True, "DROPOUT": 0.0},
        },
        "OPTIM": {
            "NAME": "adam",
            "LR": 0.0003,
            "WEIGHT_DECAY": 0.0005,
            "MOMENTUM": 0.9,
            "SGD_DAMPNING": 0,
            "SGD_NESTEROV": False,
            "RMSPROP_ALPHA": 0.99,
            "ADAM_BETA1": 0.9,
            "ADAM_BETA2": 0.999,
            # True: child modules not in NEW_LAYERS learn at LR * BASE_LR_MULT.
            "STAGED_LR": False,
            "NEW_LAYERS": (),
            "BASE_LR_MULT": 0.1,
            "LR_SCHEDULER": "single_step",
            # Not positive: MAX_EPOCH.
            "STEPSIZE": (-1,),
            "GAMMA": 0.1,
            "MAX_EPOCH": 10,
            # Not positive: no warmup.
            "WARMUP_EPOCH": -1,
            # "linear" or "constant".
            "WARMUP_TYPE": "linear",
            "WARMUP_CONS_LR": 1e-05,
            "WARMUP_MIN_LR": 1e-05,
            # True: the schedule proper starts at its epoch 0 after the warmup, else at WARMUP_EPOCH.
            "WARMUP_RECOUNT": True,
        },
        "TRAIN": {
            # Save every so many epochs; 0: only the last.
            "CHECKPOINT_FREQ": 0,
            # Print every so many batches.
            "PRINT_FREQ": 10,
            # TrainerXU's epoch: "train_x", "train_u" or "smaller_one".
            "COUNT_ITER": "train_x",
        },
        "TEST": {
            "EVALUATOR": "Classification",
            "PER_CLASS_RESULT": False,
            # True: save the confusion matrix (rows: true classes, each summing to 1) as cmat.pt.
            "COMPUTE_CMAT": False,
            # True: no testing at all, after training or for choosing the best model.
            "NO_TEST": False,
            # "test" or "val".
            "SPLIT": "test",
            # "last_step" or "best_val".
            "FINAL_MODEL": "last_step",
        },
        "TRAINER": {
            "NAME": "",
            # Domain adaptation
            "MCD": {"N_STEP_F": 4},
            "MME": {"LMDA": 0.1},
            "CDAC": {
                "CLASS_LR_MULTI": 10,
                "RAMPUP_COEF": 30,
                "RAMPUP_ITRS": 1000,
                "TOPK_MATCH": 5,
                "P_THRESH": 0.95,
                "STRONG_TRANSFORMS": (),
            },
            "SE": {"EMA_ALPHA": 0.999, "CONF_THRE": 0.95, "RAMPUP": 300},
            "M3SDA": {"LMDA": 0.5, "N_STEP_F": 4},
            "DAEL": {"WEIGHT_U": 0.5, "CONF_THRE": 0.95, "STRONG_TRANSFORMS": ()},
            # Domain generalization
            "CROSSGRAD": {"EPS_F": 1.0, "EPS_D": 1.0, "ALPHA_F": 0.5, "ALPHA_D": 0.5},
            "DDAIG": {
                "G_ARCH": "",
                "LMDA": 0.3,
                "CLAMP": False,
                "CLAMP_MIN": -1.0,
                "CLAMP_MAX": 1.0,
                "WARMUP": 0,
                "ALPHA": 0.5,
            },
            "DAELDG": {"WEIGHT_U": 0.5, "CONF_THRE": 0.95, "STRONG_TRANSFORMS": ()},
            "DOMAINMIX": {"TYPE": "crossdomain", "ALPHA": 1.0, "BETA": 1.0},
            # Semi-supervised learning
            "ENTMIN": {"LMDA": 0.001},
            "MEANTEACHER": {"WEIGHT_U": 1.0, "EMA_ALPHA": 0.999, "RAMPUP": 5},
            "MIXMATCH": {"WEIGHT_U": 100.0, "TEMP": 2.0, "MIXUP_BETA": 0.75, "RAMPUP": 20000},
            "FIXMATCH": {"WEIGHT_U": 1.0, "CONF_THRE": 0.95, "STRONG_TRANSFORMS": ()},
        },
    }
)
