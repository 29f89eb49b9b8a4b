"""Variants on a serving engine: measured now, and as data/results/served.json has it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from transformers import AutoTokenizer

from helpers.files import key_hash
from helpers.harness.compare import circumstances
from helpers.harness.load import load
from helpers.harness.serve import Server, answers, serving
from helpers.harness.variants import Original, Variant
from helpers.measure.answers import ends_of, greedy_answers
from helpers.measure.stats import quantile_interval
from helpers.results import BadRecord, read
