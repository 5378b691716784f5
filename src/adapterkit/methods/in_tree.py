"""The methods of this package: a method is in the tree once its config has a line here.

`adapterkit` gives these names to users, as `ak.LoRAConfig`, and `METHODS` holds the methods that they configure.
"""

from .bitfit import BitFitConfig as BitFitConfig
from .bottleneck import BottleneckConfig as BottleneckConfig
from .compacter import CompacterConfig as CompacterConfig
from .ia3 import IA3Config as IA3Config
from .invertible import InvertibleConfig as InvertibleConfig
from .lora import LoRAConfig as LoRAConfig
from .norm_tuning import NormTuningConfig as NormTuningConfig
from .vera import VeRAConfig as VeRAConfig
