#!/usr/bin/env bash
# The tests with another PyTorch, from the newest wheel in dist/: tests/against_torch.sh VERSION (make test-torch).
#
# Only the tests and benchmarks are copied to where they run, so that nothing but the wheel can be imported; those of the
# sources and of the build stay behind. The environments, of several gigabytes each, are kept in VENVS (build/torch).
# PYTHON names the interpreter (python3).
set -eu
cd "$(dirname "$0")/.."
version=${1:?the version of PyTorch, such as 2.4.0}
wheel=$(ls -t dist/*.whl 2> /dev/null | head -1)
[ -n "$wheel" ] || { echo "tests/against_torch.sh: no wheel in dist/; run make wheel first" >&2 && exit 2; }
venv=$(realpath -m "${VENVS:-build/torch}/$version") scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# transformers 5 imports no PyTorch before 2.6; the interpreters of old Triton, which PyTorch chooses, know no new numpy.
case $version in
    2.4 | 2.4.* | 2.5 | 2.5.*) others=("transformers<5" "numpy<2") ;;
    *) others=(transformers) ;;
esac
grep -vE '^(torch|transformers|triton|numpy)==' constraints.txt > "$scratch/constraints.txt"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip="$venv/bin/python -m pip --quiet --disable-pip-version-check"
$pip install -c "$scratch/constraints.txt" "torch==$version" "${others[@]}" "$wheel[test]"
$pip install --no-deps --force-reinstall "$wheel" # of the same version as yesterday's

cp -r tests benchmarks csrc pyproject.toml "$scratch"  # csrc: for the emulation of the kernels
cd "$scratch"
"$venv/bin/python" -c 'import awd_fast, sys; sys.exit(not awd_fast.__file__.startswith(sys.prefix))'
"$venv/bin/python" -m awd_fast info
"$venv/bin/python" -m pytest tests --ignore=tests/test_build.py --ignore=tests/test_wheel.py --ignore=tests/test_structure.py \
    --ignore=tests/test_cuda_binaries.py --ignore=tests/test_triton_compile.py # of the toolkit and the Triton that are pinned
