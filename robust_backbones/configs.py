"""The configurations and studies that come with the package; both lie at the top of a checkout too."""

from __future__ import annotations

from pathlib import Path

CONFIG_DIR = Path(__file__).with_name("detectron_configs")
STUDY_DIR = Path(__file__).with_name("studies")
