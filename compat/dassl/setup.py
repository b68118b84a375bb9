"""The distribution `dassl`: a small drop-in for Dassl.pytorch's public surface."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="dassl",
    version="0.6.3.post2",
    description="A drop-in for the part of Dassl.pytorch that CoOp-family repositories use",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["dassl", "dassl.*"]),
    package_data={"dassl": ["py.typed"]},
    install_requires=["torch>=2.4", "torchvision", "numpy", "pillow", "yacs", "tqdm"],
    extras_require={
        "tensorboard": ["tensorboard"],
        "download": ["gdown"],
        "test": ["pytest"],
    },
)
