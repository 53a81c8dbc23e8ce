#!/usr/bin/env bash
# The compiled operators under a memory checker, in a copy of the package: tests/sanitize.sh [address|valgrind].
#
# address: -fsanitize=address,undefined over the kernels' tests. valgrind: memcheck over a few small calls of every
# operator, for reads of memory that was never written; only errors with the module in their stack count.
# PYTHON names the interpreter (python3); it needs what the tests need, and pybind11.
set -eu
cd "$(dirname "$0")/.."
root=$PWD mode=${1:-address} python=$(command -v "${PYTHON:-python3}") scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

case $mode in
address) options="-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer" ;;
valgrind) options="-O1" ;;
*) echo "tests/sanitize.sh: $mode is neither address nor valgrind" >&2 && exit 2 ;;
esac
flags="-std=c++17 -g -fPIC -fvisibility=hidden -fopenmp -fno-math-errno -fno-trapping-math -Wno-psabi
    -Wno-ignored-attributes $options $("$python" -m pybind11 --includes)"
cp -r awd_fast tests pyproject.toml "$scratch"
rm -f "$scratch"/awd_fast/*.so
find csrc -name '*.cpp' | xargs -P 2 -I{} sh -c "g++ $(echo $flags) -c {} -o $scratch/\$(basename {}).o"
g++ -shared $flags "$scratch"/*.o \
    -o "$scratch/awd_fast/_C$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')"

cd "$scratch"
export PYTHONPATH=$scratch PYTHONMALLOC=malloc OMP_NUM_THREADS=2
if [ "$mode" = address ]; then
    export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
        "$python" -m pytest --capture=sys -p no:cacheprovider tests/test_native.py tests/test_adam.py tests/test_merge_rows.py \
        tests/test_properties.py tests/test_sparse.py tests/test_sparse_chance.py -k "not many_iterations and not long_runs and not unequal_norms and not accuracy and not narrow_storage"
    exit
fi
# Valgrind knows no AVX-512. PyTorch picks by the CPU that valgrind shows it.
export AWD_FAST_CPU_ISA=avx2
valgrind --error-limit=no --num-callers=30 --log-file=log.txt "$python" tests/small_calls.py
"$python" - "$scratch" << 'END'
import re, sys

errors = re.split(r"==\d+== \n", open("log.txt").read())
found = [error for error in errors if re.search(r"(at|by) 0x", error) and re.search(r"awd::|_C\.cpython", error)]
print("\n".join(found[:20]))
print(f"valgrind: {len(found)} errors in awd_fast._C, {len(errors)} blocks in the log")
sys.exit(bool(found))
END
