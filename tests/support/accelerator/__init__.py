"""An accelerator that is emulated on a CPU: while it is in use, "emulated" is a device of torch's.

    import accelerator

    with accelerator.in_use():
        model.to("emulated")(ids.to("emulated")).loss.backward()    # real values, computed on the CPU
        with accelerator.watch() as seen:
            step()
        seen.waits, seen.peak_bytes, seen.at_peak()                  # [Wait(kind, line)], bytes, {line: bytes}
        seen.traffic_by_operation(), seen.traffic_by_line()          # bytes that were read and written
        accelerator.parts(model, optimizer)                          # bytes held now: weights, gradients, states, buffers, others
        accelerator.set_total_memory(8 << 30)                        # a card of 8 GiB: more is a torch.OutOfMemoryError
        accelerator.hazards()                                        # host memory written to while it was being copied, …

    with accelerator.in_use(computes=False): ...                     # the same, with nothing computed: shapes and bytes alone
    accelerator.know_four_bits()                                     # bitsandbytes' kernels on the device

Tensors are plain ones of torch's PrivateUse1 backend, each over a storage of its own, and torch's composite kernels run as they
do for CUDA. As on CUDA: mixed devices are refused; the device has random numbers of its own; a blocking copy, either way,
waits for the device; one that does not block, to pinned memory, arrives at the next wait, and reads NaN or -1 until then.

Not modelled: speed, several cards, the memory that a kernel takes inside, the allocator's rounding and fragments, graphs,
torch.compile, sparse tensors, the rounding of CUDA's kernels. Attention holds no scores, unless it has dropout and is computed.
"""

from accelerator.backend import can_be_emulated, in_use
from accelerator.four_bits import know_four_bits
from accelerator.memory import NAME, device, is_available, parts, set_total_memory
from accelerator.streams import hazards
from accelerator.watching import Wait, Watch, watch

__all__ = [
    "NAME", "Wait", "Watch", "can_be_emulated", "device", "hazards", "in_use", "is_available",
    "know_four_bits", "parts", "set_total_memory", "watch",
]  # fmt: skip
