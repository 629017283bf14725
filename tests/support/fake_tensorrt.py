"""A library with the calls of TensorRT-RTX that computes plans in PyTorch, on the CPU.

A fake plan names its segment (`engine.build.segments`). As in the real library, tensors come as
addresses alone: they are read and written where they were said to be.
"""

import ctypes
import enum
import hashlib
import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import torch

from engine.build.plan_proofs import PlanProof
from engine.build.segments import DEPLOY, SEGMENTS, Segment
from engine.config import ModelConfig
from engine.machine.gpu import Gpu
from engine.package.folder import PackageWriter, open_folder
from engine.tensorrt.plans import PlanRecord, ProgramRecord, TokenRange
from tests.support import packages

VERSION = "1.7.1.116"
GPU = Gpu("RTX 4090", "GPU-1", (8, 9), (12, 8), "570.86.15", 24 * 2**30, 23 * 2**30)
STREAM = 77
PROOF = PlanProof(kernels=1, products8=1, attentions8=0, attentions=0)
RANGE = TokenRange(64, 96, 200)


class Invalidity(enum.IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4


class FakeLibrary:
    """The fake library. `refuses` names calls that fail; `runs` lists plan, tokens, stream."""

    __version__ = VERSION
    EngineInvalidityDiagnostics = Invalidity
    DynamicShapesKernelSpecializationStrategy = enum.Enum("Strategy", "LAZY EAGER NONE")
    ExecutionContextAllocationStrategy = enum.Enum("Allocation", "STATIC USER_MANAGED")

    class ILogger:
        pass

    def __init__(self, validity="VALID", bits=0, refuses=(), card="4090"):
        self.validity, self.refuses, self.card = (
            (SimpleNamespace(name=validity), bits),
            refuses,
            card,
        )
        self.runs, self.compiled, self.logger, self.asked = [], [], None, []

    def Runtime(self, logger):
        assert isinstance(logger, self.ILogger)
        self.logger = logger
        return self

    def refuse(self, call):
        """Tells if a call fails: as the library's do, with a message to the logger."""
        if call in self.refuses:
            self.logger.log(SimpleNamespace(name="INFO"), "something else")
            self.logger.log(SimpleNamespace(name="ERROR"), f"{call} went wrong.")
        return call in self.refuses

    def get_engine_validity(self, buffer):
        self.asked.append("validity")
        return self.validity

    def deserialize_cuda_engine(self, serialized_engine):
        self.asked.append("engine")
        return None if self.refuse("deserialize") else FakeEngine(self, serialized_engine)


class FakeEngine:
    def __init__(self, library, data):
        facts = json.loads(data)
        self.library, self.name = library, facts["segment"]
        self.segment = Segment(self.name, ModelConfig(dim=facts["dim"], ffn=facts["ffn"]), DEPLOY)

    def create_runtime_config(self):
        return FakeConfig(self.library)

    def create_execution_context(self, runtime_config):
        return None if self.library.refuse("context") else FakeContext(self, runtime_config)


class FakeConfig:
    def __init__(self, library):
        self.library, self.cache, self.allocation = library, None, None
        self.dynamic_shapes_kernel_specialization_strategy = None

    def create_runtime_cache(self):
        return FakeCache(self.library.card)

    def set_runtime_cache(self, cache):
        self.cache = cache
        return not self.library.refuse("cache")

    def set_execution_context_allocation_strategy(self, strategy):
        self.allocation = strategy


class FakeCache:
    """Numbers of tokens that kernels were compiled for, and the card that they are for."""

    def __init__(self, card):
        self.card, self.tokens = card, set()

    def serialize(self):
        return bytearray(json.dumps([self.card, *sorted(self.tokens)]).encode())

    def deserialize(self, blob):
        card, *tokens = json.loads(blob)
        if card != self.card:
            return False
        self.tokens = set(tokens)
        return True


class FakeContext:
    def __init__(self, engine, config):
        self.engine, self.config, self.library = engine, config, engine.library
        self.ports = {port.name: port for port in engine.segment.inputs}
        self.shapes, self.addresses, self.memory = {}, {}, (0, 0)
        assert config.allocation.name == "USER_MANAGED"
        assert config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return name in self.ports and not self.library.refuse("shape")

    def set_tensor_address(self, name, memory):
        self.addresses[name] = memory
        return not self.library.refuse("address")

    def update_device_memory_size_for_shapes(self):
        return 1000 * self.shapes["x"][1]

    def set_device_memory(self, memory, size):
        self.memory = memory, size

    def execute_async_v3(self, stream_handle):
        if self.library.refuse("execute"):
            return False
        tokens = self.shapes["x"][1]
        address, size = self.memory
        assert size == 1000 * tokens
        ctypes.memset(address, 0xFF, size)  # it is ours: nothing else may lie there
        if tokens not in self.config.cache.tokens:
            self.config.cache.tokens.add(tokens)
            self.library.compiled.append((self.engine.name, tokens))
        for name, port in self.ports.items():
            assert self.shapes.get(name, port.shape) == port.sized(tokens)
        given = [at(self.addresses[port.name], port, tokens) for port in self.ports.values()]
        with torch.inference_mode():
            made = self.engine.segment(*given)
        for port, tensor in zip(self.engine.segment.outputs, made, strict=True):
            at(self.addresses[port.name], port, tokens).copy_(tensor)
        self.library.runs.append((self.engine.name, tokens, stream_handle))
        return True


def at(address, port, tokens):
    """The tensor of a port that lies at an address."""
    shape = port.sized(tokens)
    nbytes = torch.Size(shape).numel() * port.dtype.itemsize
    data = (ctypes.c_char * nbytes).from_address(address)
    return torch.frombuffer(data, dtype=torch.uint8).view(port.dtype).view(shape)


def plan_data(name, config):
    return json.dumps({"segment": name, "dim": config.dim, "ffn": config.ffn}).encode()


def fake_plans(config):
    return {name: plan_data(name, config) for name in SEGMENTS}


def program(config, files=None):
    """The record that a build makes; `config.ffn` is padded. `files`: data by name."""
    plans = {}
    for name, data in (files or fake_plans(config)).items():
        segment, digest = Segment(name, config, DEPLOY), hashlib.sha256(data).hexdigest()
        inputs, outputs = (
            tuple(port.record() for port in ports) for ports in (segment.inputs, segment.outputs)
        )
        plan = PlanRecord(f"{name}.plan", len(data), digest, inputs, outputs, asdict(PROOF))
        plans[name] = plan
    return ProgramRecord("sm89", VERSION, RANGE, plans, ())


def record(config, files=None):
    """The record of `program` as it is written into the manifest."""
    return asdict(program(config, files))


def planned_package(folder, config, tensorrt=None, files=None):
    """A package with plans, by default fake ones. `tensorrt`: what its manifest says of them."""
    files = files or fake_plans(config)
    manifest = replace(packages.MANIFEST, tensorrt=tensorrt or record(config, files))
    with PackageWriter(folder, "a") as writer:
        writer.write("group", lambda: packages.make(0))
        writer.add_file("kernels/gemm.i8.cubin", packages.CODE)
        for name, data in files.items():
            writer.add_file(f"plans/{name}.plan", data)
        return open_folder(writer.finish(manifest))
