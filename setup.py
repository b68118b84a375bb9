"""Install the top-level folders as dfzsl.trainers, dfzsl.datasets and dfzsl.configs.

The checkout has the folders of CoOp, but packages called `datasets` and `trainers` in site-packages would
shadow those of other projects.
"""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = {
    "dfzsl": "dfzsl",
    "dfzsl.trainers": "trainers",
    "dfzsl.datasets": "datasets",
    "dfzsl.configs": "configs",
    "dfzsl.safe_pickle": "compat/dassl/dassl/utils/safe_pickle",  # also used with the original Dassl
}

# Used if Dassl is not installed (dfzsl/__init__.py).
DROP_IN = {"dfzsl.drop_in.dassl": "compat/dassl/dassl"}

setup(
    name="dfzsl",
    version="0.3.0.dev0",
    description="Data-free generalized zero-shot learning for the CoOp/Dassl prompt-learning toolbox",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[
        ".".join([package, *inner])
        for package, folder in (FOLDERS | DROP_IN).items()
        for inner in [(), *((name,) for name in find_packages(folder))]
    ],
    package_dir=FOLDERS | DROP_IN,
    package_data={
        "dfzsl": ["py.typed", "*.pyi"],
        "dfzsl.report": ["*.yaml", "*.css"],
        "dfzsl.datasets.shapes": ["*.safetensors", "*.json", "*.csv"],
        "dfzsl.configs": ["*.yaml", "*/*.yaml", "*/*/*.yaml", "*/*/*/*.yaml"],
    },
    entry_points={"console_scripts": ["dfzsl = dfzsl.cli.main:entry"]},
    install_requires=[
        "click>=8.2",
        "torch>=2.4",
        "torchvision",
        "open_clip_torch>=3.3",
        "fastapi",
        "fastapi-offline",  # Swagger UI without other hosts
        "filelock",
        "anyio",
        "httpx>=0.28",
        "matplotlib",
        "numpy",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "pillow",
        "pydantic>=2.8",
        "pyyaml",
        "safetensors",
        "scipy",
        "submitit",
        "tabulate>=0.10",
        "tensorboard",
        "tqdm",
        "uvicorn",
        "yacs",
    ],
    extras_require={
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
        "test": [
            *["nbclient", "nbformat", "ipykernel"],  # for the notebook
            *["pytest", "pytest-xdist", "hypothesis", "scikit-learn", "skops"],
            *["ruff", "mypy", "import-linter", "codespell[toml]"],
            *["mkdocs-material", "mkdocstrings[python]"],
            *["playwright", "axe-playwright-python"],  # for the HTML report, in Chromium
        ],
    },
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
