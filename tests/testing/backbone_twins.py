"""Backbones and hosts, each broken in one way."""

import copy
from dataclasses import replace

import torch
from testing.small_hosts import (
    PATCH,
    WIDTH,
    JointBackbone,
    JointBlock,
    JointHost,
    make_inputs,
)
from testing.twins import ALL, Twin
from torch import nn

from adaptok import HostInputs, HostNumbers, TokenInput


def ask_for_layers(model):
    return model(*make_inputs().args, layers=[1])


OPTIONS = {"inputs": make_inputs, "refused": {"layers=": ask_for_layers}}


class WrongWidth(JointBackbone):
    @classmethod
    def match(cls, model):
        made = super().match(model)
        made.width = WIDTH + 1
        return made


class MatchesAll(JointBackbone):
    @classmethod
    def match(cls, model):
        return cls(containers=("blocks",), width=WIDTH, depth=3)


class HoldsTable(JointBackbone):
    def __init__(self, **facts):
        super().__init__(**facts)
        self.tables = [torch.zeros(3)]


class ThreeSamples(JointBackbone):
    def example(self, model):
        return make_inputs()


class NumbBlock(JointBlock):
    strength = 1e-6


class NumbHost(JointHost):
    block = NumbBlock


class ChangesAll(JointBackbone):
    def write(self, call):
        return 1.001 * call.x, call.streams["text"]


class CachesOutput(JointHost):
    def __init__(self):
        super().__init__()
        self.seen, self.answer = None, None

    def forward(self, image, text, layers=None):
        if self.seen is not image:
            self.seen, self.answer = image, super().forward(image, text, layers)
        return self.answer


class RunsAll(JointBackbone):
    def run(self, block, index, call):
        rows = call.x.shape[1]
        missing = 1 + call.grid[0] * call.grid[1] - rows
        places = call.token_inputs["positions"]
        after = super().run(
            block,
            index,
            replace(
                call,
                x=nn.functional.pad(call.x, (0, 0, 0, missing)),
                token_inputs={
                    "positions": replace(
                        places, value=nn.functional.pad(places.value, (0, 0, 0, missing))
                    )
                },
            ),
        )
        return replace(call, x=after.x[:, :rows], streams=after.streams)


class ChunksClassToken(JointBackbone):
    def hand_over(self, entrance, module, args, kwargs):
        return replace(super().hand_over(entrance, module, args, kwargs), start=0)

    def read(self, numbers, args, kwargs):
        call = super().read(numbers, args, kwargs)
        places = replace(call.token_inputs["positions"], start=0)
        return replace(call, token_inputs={"positions": places})


class TurnsGrid(JointBackbone):
    def grid(self, image):
        return (image.shape[-1] // PATCH, image.shape[-2] // PATCH)


class WrongRows(JointBackbone):
    def read(self, numbers, args, kwargs):
        call = super().read(numbers, args, kwargs)
        places = replace(call.token_inputs["positions"], start=0)
        return replace(call, token_inputs={"positions": places})


class SharesCondition(JointBackbone):
    def read(self, numbers, args, kwargs):
        call = super().read(numbers, args, kwargs)
        return replace(call, sample_inputs={}, shared=call.sample_inputs)

    def run(self, block, index, call):
        return super().run(block, index, replace(call, sample_inputs=call.shared))


class ByPlaceOnly(JointBackbone):
    def hand_over(self, entrance, module, args, kwargs):
        return (
            HostNumbers(self.grid(args[0]), start=1)
            if "layers" not in kwargs
            else (super().hand_over(entrance, module, args, kwargs))
        )


class ByNameOnly(JointBackbone):
    def read(self, numbers, args, kwargs):
        return super().read(numbers, args[:1], {name: kwargs[name] for name in (
            "positions", "condition", "text"
        )})  # fmt: skip


class IgnoresLayers(JointBackbone):
    def hand_over(self, entrance, module, args, kwargs):
        kwargs = {name: value for name, value in kwargs.items() if name != "layers"}
        return super().hand_over(entrance, module, args, kwargs)


class Float32Positions(JointBackbone):
    def read(self, numbers, args, kwargs):
        call = super().read(numbers, args, kwargs)
        places = call.token_inputs["positions"]
        places = TokenInput(places.value.float(), places.axes, places.start)
        return replace(call, token_inputs={"positions": places})


class Shared:
    """Holds a module that a deep copy does not copy."""

    def __init__(self, module):
        self.module = module

    def __deepcopy__(self, memo):
        return self


class RunsTheFirst(JointBackbone):
    @classmethod
    def match(cls, model):
        made = super().match(model)
        made.blocks = Shared(model.blocks)
        return made

    def run(self, block, index, call):
        return super().run(self.blocks.module[index], index, call)


class HoldsLambda(JointBackbone):
    def __init__(self, **facts):
        super().__init__(**facts)
        self.nothing = lambda x: x

    def __reduce__(self):
        return copy.copy, (self,)


class LambdaHost(JointHost):
    def __init__(self):
        super().__init__()
        self.nothing = lambda x: x


class AsksTheDevice(JointBackbone):
    def run(self, block, index, call):
        if call.x.abs().max().item() > 1e9:
            return call
        return super().run(block, index, call)


class DatedList(nn.ModuleList):
    """A list with a state of its own, which the container of a wrap does not carry."""

    def get_extra_state(self):
        return torch.tensor(2026)

    def set_extra_state(self, state):
        pass


class DatedHost(JointHost):
    def __init__(self):
        super().__init__()
        self.blocks = DatedList(self.blocks)


class MarksBlocks(JointBackbone):
    def run(self, block, index, call):
        block.was_here = index
        return super().run(block, index, call)


class HiddenBlocks(JointHost):
    """Keeps its blocks out of `named_modules()`, so that nobody sees that they are wrapped."""

    def named_modules(self, *args, **kwargs):
        return iter([("", self)])


class EmptyBackbone(JointBackbone):
    def example(self, model):
        return HostInputs()


TWINS = {
    "match": Twin((WrongWidth, JointHost)),
    "plain": Twin((HoldsTable, JointHost)),
    "example": Twin((ThreeSamples, JointHost)),
    "reacts": Twin((JointBackbone, NumbHost)),
    "identity": Twin((ChangesAll, JointHost), frozenset({"example", "order"})),
    "trace": Twin((JointBackbone, CachesOutput), ALL),
    "fewer": Twin((RunsAll, JointHost)),
    "cells": Twin((ChunksClassToken, JointHost)),
    "grid": Twin((TurnsGrid, JointHost)),
    "order": Twin((WrongRows, JointHost)),
    "batch": Twin((SharesCondition, JointHost)),
    "keywords": Twin((ByPlaceOnly, JointHost)),
    "checkpointing": Twin((ByNameOnly, JointHost)),
    "refused": Twin((IgnoresLayers, JointHost)),
    "half": Twin((Float32Positions, JointHost)),
    "deepcopy": Twin((RunsTheFirst, JointHost)),
    "pickle": Twin((JointBackbone, LambdaHost)),
    "compile": Twin((AsksTheDevice, JointHost)),
    "keys": Twin((JointBackbone, DatedHost)),
    "unwrap": Twin((MarksBlocks, JointHost)),
    "second_wrap": Twin((JointBackbone, HiddenBlocks), ALL),
}
MORE = {
    "match": Twin((MatchesAll, JointHost)),
    "plain": Twin((HoldsLambda, JointHost)),
    "example": Twin((EmptyBackbone, JointHost)),
}
GOOD = ((JointBackbone, JointHost),)
