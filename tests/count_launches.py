"""What torch.compile would launch on an H100: counted from its own code, without a GPU.

    python tests/count_launches.py "CM on OC" --batch-size 512     # a training step; 2 to 5 minutes
    python tests/count_launches.py "CM on OC" --norm torch         # with torch's own group norm
    python tests/count_launches.py DDPM --sampling                # calls of the network only

Prints launches (Triton's kernels, and calls of cuDNN, cuBLAS and attention) and the bytes that they
read and write, as inductor counts them, in bfloat16, without the optimizer. Nothing is computed:
tensors are fake ones that say they are on CUDA, and inductor stops before it would run its code.

Needs Linux, gcc and g++, PyTorch's wheel with CUDA (and so Triton), and 2 to 5 GB. It builds two
stubs, a CUDA driver that does nothing and a count of devices, starts itself with them, and replaces
internals of torch. Written for torch 2.14; another version may need another list.
"""
import argparse
import copy
import ctypes
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

DRIVER = """
int cuDevicePrimaryCtxGetState(int dev, unsigned *flags, int *active)
{ *flags = 0; *active = 0; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "stub"; return 0; }
"""
DEVICES = """
extern "C" { int fake_cuda_count = 0; }
namespace c10 { namespace cuda { signed char device_count() noexcept { return fake_cuda_count; } } }
"""
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 << 30, warp_size=32,
    multi_processor_count=132, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, shared_memory_per_block=49152, gcnArchName="",
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20)


def restart_with_stubs():
    """Run this script again with the two stubs in place of the CUDA driver and its devices."""
    with tempfile.TemporaryDirectory() as folder:
        for name, compiler, text, suffix in (("libcuda.so.1", "gcc", DRIVER, "c"),
                                             ("devices.so", "g++", DEVICES, "cpp")):
            source = Path(folder, f"{name}.{suffix}")
            source.write_text(text)
            subprocess.run([compiler, "-shared", "-fPIC", "-o", Path(folder, name), source],
                           check=True)
        environment = {**os.environ, "LD_LIBRARY_PATH": folder, "CUDA_VISIBLE_DEVICES": "",
                       "LD_PRELOAD": str(Path(folder, "devices.so")), "COUNT_LAUNCHES": folder,
                       "TORCHINDUCTOR_CACHE_DIR": str(Path(folder, "cache"))}
        return subprocess.run([sys.executable, "-B", *sys.argv], env=environment).returncode


# --------------------------------------------------------------------------------------------------
# An H100 that is not there

def pretend_devices():
    """torch and Triton see one H100."""
    import torch
    import torch.amp.autocast_mode
    import torch.cuda.amp.common
    import torch.cuda.graphs
    import torch.utils._triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    torch._C._ensureCUDADeviceGuardSet()
    devices = ctypes.CDLL(os.environ["LD_PRELOAD"])
    ctypes.c_int.in_dll(devices, "fake_cuda_count").value = 100

    class Driver:
        """What inductor asks of Triton's driver."""

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self):
            return torch.device("cuda", 0)

        def get_device_interface(self):
            return torch.cuda

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

        def get_benchmarker(self):
            return None

        def map_python_to_cpp_type(self, kind):
            return kind

        @staticmethod
        def is_active():
            return True
    driver.set_active(Driver())
    for name in dir(torch.utils._triton):
        cached = getattr(torch.utils._triton, name)
        if name.startswith("has_triton") and hasattr(cached, "cache_clear"):
            cached.cache_clear()
    torch.utils._triton.has_triton = lambda *_: True

    answers = {
        "get_device_properties": H100, "_get_device_properties": H100,
        "get_device_capability": (9, 0), "is_initialized": True, "current_device": 0,
        "_lazy_init": None, "is_available": True, "device_count": 1, "set_device": None,
        "_exchange_device": -1, "_maybe_exchange_device": -1, "mem_get_info": (70 << 30, 80 << 30),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
        "is_current_stream_capturing": False, "is_bf16_supported": True}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.graphs._cuda_isCurrentStreamCapturing = lambda: False
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.manual_seed = torch.default_generator.manual_seed


def pretend_operations():
    """Convolutions choose cuDNN, attention CUDA's kernels; generators say they are on CUDA."""
    import torch
    import torch.nn.functional as F

    import losses
    select = torch._C._select_conv_backend
    layout = torch._C._conv_determine_backend_memory_format
    attention = F.scaled_dot_product_attention
    exponential = torch.Tensor.exponential_

    def last(x):
        one = x.shape[1] == 1 or x.shape[2] * x.shape[3] == 1
        return x.is_contiguous(memory_format=torch.channels_last) and not one

    def layout_of(x, weight, backend):
        if backend != "cudnn":
            return layout(x, weight, backend)
        channels_last = last(x) or last(weight)
        return torch.channels_last if channels_last else torch.contiguous_format

    def attend(q, k, v, **options):
        if not q.is_cuda:
            return attention(q, k, v, **options)
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False,
                                                                  return_debug_mask=False)[0]

    class Generator(torch.Generator):
        """A CPU's that says it is on another device."""

        def __new__(cls, device):
            return torch.Generator.__new__(cls)

        def __init__(self, device):
            self.place = torch.device(device)

        @property
        def device(self):
            return self.place
    torch._C._select_conv_backend = lambda x, *args, **options: (
        "cudnn" if x.is_cuda else select(x, *args, **options))
    torch._C._conv_determine_backend_memory_format = layout_of
    F.scaled_dot_product_attention = attend
    torch.Tensor.exponential_ = lambda x, *args, **options: (
        x.uniform_() if x.is_cuda else exponential(x, *args, **options))
    losses.generator = lambda device, *_: Generator(device)


def move(module):
    """Give a module fake parameters and buffers on CUDA, in place; within a FakeTensorMode."""
    import torch
    for m in module.modules():
        for group in (m._parameters, m._buffers):
            for name, x in group.items():
                if x is not None:
                    fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
                    if isinstance(x, torch.nn.Parameter):
                        fake = torch.nn.Parameter(fake, x.requires_grad)
                    group[name] = fake
        for name, x in vars(m).items():
            if isinstance(x, torch.Tensor):
                setattr(m, name, torch.empty(x.shape, dtype=x.dtype, device="cuda"))


# --------------------------------------------------------------------------------------------------
# Counting

class Done(BaseException):
    """Inductor has written its code, and is not to load it."""


def counting_backend(found):
    """A backend of torch.compile that appends (code, bytes) of each graph to `found`."""
    import torch._functorch.config
    import torch._inductor.config as config
    from torch._inductor import compile_fx, graph
    from torch._inductor.fx_passes import joint_graph
    config.joint_graph_constant_folding = False
    config.compile_threads = 1
    config.fx_graph_cache = False
    config.autotune_local_cache = False
    torch._functorch.config.enable_autograd_cache = False
    joint_graph.lazy_init = lambda *_, **__: None       # it would run patterns on a device

    def write_code(self):
        code = self.codegen()[0]
        found.append((getattr(code, "value", code), self.count_bytes()[0]))
        raise Done
    graph.GraphLowering.compile_to_module = write_code
    graph.GraphLowering._compile_to_module = write_code
    compile_inner = compile_fx.compile_fx_inner

    def inner(module, inputs, **options):
        kept = copy.deepcopy(module)
        try:
            compile_inner(module, inputs, **options)
        except Done:
            pass

        def call(args):
            return kept(*args)
        call._boxed_call = True
        return call
    return lambda module, inputs: compile_fx.compile_fx(module, inputs, inner_compile=inner)


def count_step(method, batch_size, backend):
    """Compile a training step of a method of bench.py, forwards and backwards."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from probes import bench
    from losses import draw_batch
    images = bench.noise_images()
    net = bench.make_network(method, bench.NETWORK).to(memory_format=torch.channels_last)
    objective = bench.make_objective(method, net, images)
    with FakeTensorMode():
        move(objective)
        batch = draw_batch(*inputs(batch_size), objective, seed=0, step=1, flip=True)
        with torch.autocast("cuda", torch.bfloat16):
            total, *_ = torch.compile(objective, backend=backend)(batch)
        total.backward()


def count_call(method, batch_size, backend):
    """Compile a call of a method's merged network, with weights in bfloat16, as sample.py makes."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from probes import bench
    import runtime
    from cm_layers import merge
    from sample import prepare
    net = merge(bench.make_network(method, bench.NETWORK)).to(memory_format=torch.channels_last)
    net = prepare(net, runtime.Runtime(torch.device("cpu"), torch.bfloat16), (3, 32, 32), 1, 1)
    with FakeTensorMode(), torch.no_grad():
        move(net.requires_grad_(False))
        x, y = inputs(batch_size)
        with torch.autocast("cuda", torch.bfloat16):
            torch.compile(net, backend=backend)(x, y, y)


def inputs(batch_size):
    """x (N, 3, 32, 32), channels last, and y (N,): fake tensors on CUDA."""
    import torch
    x = torch.empty(batch_size, 32, 32, 3, device="cuda").permute(0, 3, 1, 2)
    return x, torch.zeros(batch_size, dtype=torch.int64, device="cuda")


def main():
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", help="a method of bench.py")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--norm", choices=("ours", "torch"), default="ours")
    parser.add_argument("--sampling", action="store_true")
    args = parser.parse_args()
    if "COUNT_LAUNCHES" not in os.environ:
        sys.exit(restart_with_stubs())
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    pretend_devices()
    pretend_operations()
    if args.norm == "torch":
        import torch.nn.functional as F

        import model
        model.norm_silu = lambda norm, x, silu=True: F.silu(norm(x)) if silu else norm(x)
    found = []
    count = count_call if args.sampling else count_step
    count(args.method, args.batch_size, counting_backend(found))
    code = "\n".join(text for text, _ in found)
    triton = len(re.findall(r"\.run\(", code))
    others = len(re.findall(r"extern_kernels\.\w+\(|= torch\.ops\.", code))
    moved = sum(n for _, n in found) / 1e9
    what = "call" if args.sampling else "step"
    print(f"{args.method}, batch {args.batch_size}, one {what}: {triton + others:,} launches, "
          f"{triton:,} of them Triton's; {moved:.1f} GB moved")
    if args.sampling:
        terabytes = moved / args.batch_size * 2 * 50 * 50_000 / 1000
        print(f"50,000 guided images in 50 steps: {terabytes:.0f} TB")


if __name__ == "__main__":
    main()
