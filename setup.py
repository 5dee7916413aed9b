"""Packaging; Detectron2 is not on PyPI and is installed by tools/install_detectron2.py (``make setup`` does both)."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = (ROOT / "robust_backbones/__init__.py").read_text().split('__version__ = "')[1].split('"')[0]

setup(
    name="robust-backbones",
    version=VERSION,
    description="Adversarially robust backbones for Detectron2: train, convert with proof, plug in, measure",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["robust_backbones", "robust_backbones.*"]),
    package_data={"robust_backbones": ["checkpoint/published_backbones.csv", "analysis/paper/salman2020_transfer.csv"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "numpy",
        "pillow",
        "faster-coco-eval>=1.6",
        "pycocotools>=2.0.8",
        "fvcore>=0.1.5",
        # The same module cv2 as opencv-python, without the windows that need a screen's libraries.
        "opencv-python-headless>=4.11",
        "huggingface_hub>=1.0",
        "matplotlib",
        # The AutoAttack of its authors.
        "pyautoattack>=0.2",
        "safetensors>=0.5",
        # torchvision reads the lists of Flowers and Cars with it.
        "scipy>=1.11",
        "tensorboard",
        "tqdm",
        "tyro>=0.9",
    ],
    extras_require={
        # Beside these the corruptions need imagecorruptions-imaug, which make setup installs with --no-deps: it asks
        # for opencv-python, whose files would overwrite those of the headless one.
        "corruptions": ["scikit-image>=0.21", "numba>=0.60"],
        "inheritance": ["POT>=0.9.5"],
        "slurm": ["submitit>=1.5"],
        "dev": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "dill", "submitit>=1.5", "webdataset>=1"],
    },
)
