"""Hydra finds this wherever awd_fast is installed, so that `fusion_bench method=awd_fast/awd` has its configuration."""

import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class AwdFastSearchPath(SearchPathPlugin):
    """Adds awd_fast's configurations to the search path of FusionBench, and of no other program."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if "fusion_bench" in sys.modules:
            search_path.append(provider="awd_fast", path="pkg://awd_fast.integrations.fusion_bench_config")
