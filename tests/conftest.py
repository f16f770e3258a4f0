import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

# On tensors as small as these a second thread waits longer than it computes, seconds where another process
# wants the core. The processes that tests start inherit this.
os.environ["OMP_NUM_THREADS"] = "1"
# a script's background jobs ignore Ctrl-C, which some tests send to themselves
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    # read when fp8.py is imported: its kernels run on the CPU, as Python
    os.environ["TRITON_INTERPRET"] = "1"

from data.prepare import prepare  # noqa: E402
from model import DeepSeekV3, DeepSeekV3Config  # noqa: E402


def exact_interpreter():
    """Make the casts and products of Triton's interpreter those of the hardware. As of 3.7.1 its fp32 to e4m3
    loses the carry of the mantissa, does not saturate and truncates subnormals, its fp32 to bf16 truncates,
    and its bf16 dot multiplies the raw bits. Tests only: on a GPU none of this is involved."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    dtypes = {tl.float8e4nv: torch.float8_e4m3fn, tl.bfloat16: torch.bfloat16, tl.float16: torch.float16,
              tl.float32: torch.float32}

    def to_torch(data, dtype):      # data: numpy, with fp8 and bf16 as unsigned integers
        data = torch.from_numpy(data.copy())
        return data if data.dtype == dtypes[dtype] else data.view(dtypes[dtype])

    def convert_float(data, from_dtype, to_dtype, rounding_mode):
        x = to_torch(data, from_dtype).float()
        if to_dtype == tl.float8e4nv:
            x = x.clamp(-448, 448)
        out = x.to(dtypes[to_dtype])
        return out.view({1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[out.element_size()]).numpy()

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = to_torch(a.data, a.dtype.scalar).float(), to_torch(b.data, b.dtype.scalar).float()
        return interpreter.TensorHandle((a @ b).numpy() + d.data, d.dtype.scalar)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


exact_interpreter()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def two_threads():
    """For tests of results that must not depend on how threads share the work."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def make_config():
    """A config in which every size differs from every other, so that a swapped pair shows."""
    def make(**changes):
        small = dict(vocab_size=61, hidden_size=48, intermediate_size=80, moe_intermediate_size=32,
                     num_hidden_layers=3, num_attention_heads=3, q_lora_rank=20, kv_lora_rank=16,
                     qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=28, n_routed_experts=12,
                     num_experts_per_tok=3, n_group=4, topk_group=2,
                     first_k_dense_replace=1, max_position_embeddings=128, initializer_range=0.2)
        return DeepSeekV3Config(**{**small, **changes})
    return make


@pytest.fixture
def make_model(make_config):
    """A model with such a config and random, partly negative, router biases."""
    def make(**changes):
        model = DeepSeekV3(make_config(**changes))
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.normal_(-0.3, 0.3)
        return model.eval()
    return make


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Prepared data of 12 small files."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(12):
        text = "".join(f"line {j} of {i}: {j * j % 17}\n" for j in range(40))
        (folder / f"text{i:02}.txt").write_text(text)
    prepare(folder / "tokens", input=folder)
    return folder / "tokens"


# Importing torch and what optimizers, DDP and FSDP need takes longer than a small run: one process does it,
# and forks those of every test, several as torchrun would start them. A line of JSON in, the processes' ids
# out, then their exit codes.
FORKER = """
import json, os, signal, sys
sys.path.insert(0, {root!r})
import checkpoint, torch, torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor, train
for line in sys.stdin:
    pids, (world, port, patch, argv, out) = [], json.loads(line)
    for rank in range(world):
        pid = os.fork()
        if not pid:
            if world > 1:
                os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                                   MASTER_ADDR="localhost", MASTER_PORT=str(port))
            sys.stdout, sys.stderr = open(out + f".out{{rank}}", "w"), open(out + f".err{{rank}}", "w")
            code = 0
            try:
                exec(patch)
                train.main(argv)
            except SystemExit as e:
                code = e.code
                if not isinstance(code, int):
                    code = print(e.code, file=sys.stderr) or 1
            except BaseException:
                import traceback
                code = traceback.print_exc() or 99
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        pids.append(pid)
    print(json.dumps(pids), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""


@pytest.fixture(scope="session")
def forker():
    with subprocess.Popen([sys.executable, "-c", FORKER.format(root=str(ROOT))], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def fork(forker, tmp_path):
    """start(argv) runs train.py in a process, or in one for each rank of a world, after the code in patch: ->
    ids of the processes, and a function that waits for their exit: -> what rank 0 printed, and what each
    wrote to stderr."""
    def start(argv, world=1, patch=""):
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        task = [world, port, patch, list(map(str, argv)), str(tmp_path / "rank")]
        print(json.dumps(task), file=forker.stdin, flush=True)

        def end(code=0):
            codes = json.loads(forker.stdout.readline())
            out, err = ([(tmp_path / f"rank.{which}{rank}").read_text() for rank in range(world)]
                        for which in ("out", "err"))
            assert codes == [code] * world and "Traceback" not in "".join(err), (codes, err, out)
            assert not any(out[1:])
            return out[0], err
        return json.loads(forker.stdout.readline()), end
    return start
