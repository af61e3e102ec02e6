"""What a release holds, and how it comes into being."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest_release import CLASSES, lineage, tiny, tiny_base
from torch import nn

from datavector.data.images import resize
from datavector.errors import ReleaseError
from datavector.model import BaseModel
from datavector.networks import preprocess
from datavector.release import write_release
from datavector.release.export import Served, export_onnx, fold_batchnorm, torch_logits
from datavector.release.probes import draw_probes, load_probes
from datavector.release.runtime import onnx_logits, open_session

RealRelease = Callable[[str], tuple[Path, nn.Module, BaseModel]]
