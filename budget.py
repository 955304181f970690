"""What a training run needs of its machine: the memory of a pass, the passes of a step.

    need = measure_memory(objective, batch_of)          # from a pass of one image and one of two
    K = passes_that_fit(need, images=64, free=free_memory(device))

A pass keeps tensors for its backward: so many bytes whatever its images, and so many for each. Both
are counted, not tried out: a trial that does not fit ends the process, or the machine.
"""
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks

WORKSPACE = 1.3         # of what is kept: what convolutions and their gradients need beside it
PROCESS = 200 << 20     # bytes: libraries that the first backward loads
MARGIN = 0.9            # of what is free: the estimate may be too low
CGROUPS = (             # folder, limit, usage, prefix of counters: of newer and older kernels
    ("/sys/fs/cgroup", "memory.max", "memory.current", ""),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))


class Memory(NamedTuple):
    """Bytes that a training step needs beyond what the process has already."""
    fixed: int          # gradients, Adam's two averages, and what any pass keeps
    per_image: int      # what a pass keeps for each of its images

    def of(self, images):
        """Bytes, for passes of so many images."""
        return round(PROCESS + self.fixed + WORKSPACE * self.per_image * images)


def free_memory(device):
    """Bytes that this process may still take on its device; None where that cannot be known.

    On a CPU the processes of a machine share them equally.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    known = [available(), *(left_in_container(*group) for group in CGROUPS)]
    known = [n for n in known if n is not None]
    return min(known) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if known else None


def available():
    """The machine's available bytes (Linux); elsewhere all that it has, or None."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines
                    if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def left_in_container(folder, limit, usage, prefix):
    """Limit less usage of a container's memory, or None where there is no limit.

    Copies of files, which its usage counts, go where memory is asked for, such as a pack's.
    """
    folder = Path(folder)
    try:
        left = int((folder / limit).read_text()) - int((folder / usage).read_text())
    except (OSError, ValueError):       # no such file, or the word "max"
        return None
    with suppress(OSError, ValueError):
        counters = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        left += sum(int(counters.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return max(0, left)


def kept_bytes(loss_of, module):
    """Bytes of the tensors that the graph of loss_of() keeps; those of `module` do not count."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()      # an output that its own graph holds would never be freed
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of()        # lives while its tensors are counted: no address is used twice
    del loss
    return sum(n for address, n in found.items() if address not in own)


def measure_memory(module, loss_of, images):
    """The Memory of training `module`: loss_of(n) is the loss of a pass of n images.

    images: the most that a pass may have. Nothing is computed backwards, and nothing changes.
    """
    trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    one = kept_bytes(lambda: loss_of(1), module)
    two = kept_bytes(lambda: loss_of(2), module) if images > 1 else one
    per_image = two - one if images > 1 else one
    return Memory(3 * trained + one - per_image, per_image)


def passes_that_fit(need, images, free):
    """The fewest passes over `images` images, equal ones, with which a step fits into `free` bytes.

    None where not even passes of one image fit.
    """
    for passes in range(1, images + 1):
        if images % passes == 0 and need.of(images // passes) <= MARGIN * free:
            return passes
    return None


def in_words(n):
    """ "1.2 GB" for a number of bytes."""
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"
