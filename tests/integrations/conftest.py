"""Run by `make test-integrations`; where a package is missing, its tests are not collected."""

from importlib.util import find_spec

collect_ignore_glob = [f"test_{package}*.py" for package in ("mergekit", "fusion_bench") if find_spec(package) is None]
