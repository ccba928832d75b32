# SPDX-License-Identifier: Apache-2.0
"""What a task is to the trainer, and what the trainer is to a task."""

from __future__ import annotations

import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from faceedit.errors import FaceEditError, UnknownNameError, UsageError, WeightsError, suggestion
from faceedit.training.config import AdamConfig, Recipe, TrainerConfig
from faceedit.training.ema import ExponentialMovingAverage, HalfLife

PATIENCE = timedelta(hours=4)
"""How long the other processes wait for rank 0, which scores, draws and exports alone."""

_BEFORE = "; before that: "  # between the training data of weights and those of the weights that they started from

Report = Callable[[str], Any]
"""Receives one line of progress at a time."""

if TYPE_CHECKING:
    from lightning.fabric import Fabric

# Task name (the first line of a recipe) -> "module:class", imported when used.
TASKS: dict[str, str] = {
    "maggan": "faceedit.training.maggan:MagGANTask",
    "classifier": "faceedit.training.classifier:ClassifierTask",
    "parser": "faceedit.training.parser:ParserTask",
    "attribute-tree": "faceedit.training.maskfacegan_classifier:AttributeTreeTask",
    "attribute-cnn": "faceedit.training.maskfacegan_classifier:AttributeCNNTask",
    "deeplab": "faceedit.training.maskfacegan_parser:DeepLabTask",
    "fcn": "faceedit.training.maskfacegan_parser:FCNTask",
    "region-unet": "faceedit.training.maskfacegan_parser:RegionUNetTask",
    "stylegan2": "faceedit.training.stylegan2:StyleGAN2Task",
    "e4e": "faceedit.training.e4e:E4ETask",
}


R = TypeVar("R", bound=Recipe)
T = TypeVar("T")


class TrainingDivergedError(FaceEditError):
    """Losses, gradients or weights stopped being finite; the checkpoints before it are intact."""


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part; unlike seed + step, two streams never run into each other."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def start_from(network: nn.Module, weights: str | None, *, may_lack: str | None = None) -> None:
    """Give a network the parameters of exported or registered `weights` of the same architecture; None: nothing.

    `may_lack` names a submodule that the weights may be without; it then keeps its own start.

    Raises: WeightsError if they can't be read or are of another architecture; UnknownNameError for a name that is not
            registered.
    """
    if weights is not None:
        from faceedit.registry import load_network

        given = dict(load_network(weights).state_dict())
        if may_lack is not None and not any(key.startswith(f"{may_lack}.") for key in given):
            own = network.state_dict()
            given |= {key: value for key, value in own.items() if key.startswith(f"{may_lack}.")}
        try:
            network.load_state_dict(given)
        except RuntimeError as error:  # one line for each key
            reason = " ".join(str(error).split())[:300]
            raise WeightsError(
                f"train: initial_weights must fit the recipe's network, got {weights} ({reason}); use weights of the "
                "same configuration"
            ) from error


def _training_data(weights: str | None) -> list[str]:
    """What exported or registered `weights` were trained on, latest first, as `write_weights` joins it."""
    if weights is None:
        return []
    from faceedit.registry import find, read_header

    return read_header(find(weights).path).training_data.split(_BEFORE)


def _is_finite(network: nn.Module) -> bool:
    """Whether a network's parameters and buffers are."""
    finite = [value.isfinite().all() for value in (*network.parameters(), *network.buffers())]
    return not finite or bool(torch.stack(finite).all())


class TrainingContext:
    """Networks, optimisers and averages of one run, and the Fabric that places them.

    All randomness of step k is a function of (seed, k, rank), so a resumed run needs no generator state.
    """

    def __init__(self, fabric: Fabric, config: TrainerConfig) -> None:
        self.fabric = fabric
        self.config = config
        self.device: torch.device = fabric.device
        # What is said over this group is on the CPU; over the networks' own, each message would wait for the GPU.
        self._speech: Any = None
        if fabric.world_size > 1:
            self._speech = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        self.networks: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.averages: dict[str, ExponentialMovingAverage] = {}
        self._wrapped: dict[str, nn.Module] = {}
        self._rates: dict[str, AdamConfig] = {}

    def add_network(
        self, name: str, network: nn.Module, adam: AdamConfig, *, average: bool | HalfLife = False
    ) -> nn.Module:
        """Hand a trainable network to the run. Returns the module to call in `training_step`.

        The returned wrapper applies precision and gradient synchronisation; `networks[name]` stays the bare network.
        `average` keeps an average of the weights, by `trainer.ema_decay` or by a half-life of its own.
        """
        if self.config.channels_last:
            network = network.to(memory_format=torch.channels_last)
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(
            parameters, lr=adam.rate, betas=(adam.beta1, adam.beta2), weight_decay=adam.weight_decay
        )
        network.to(self.device)
        wrapped, prepared = self.fabric.setup(network, optimizer)
        for module in wrapped.modules():
            if isinstance(module, DistributedDataParallel):
                # Not at each pass: buffers stay equal by themselves, or (batch norm's) are averaged after each step.
                module.broadcast_buffers = False
        if average:
            decay = average if isinstance(average, HalfLife) else self.config.ema_decay
            self.averages[name] = ExponentialMovingAverage(network, decay)
        self.networks[name] = network
        self.optimizers[name] = prepared
        self._wrapped[name] = wrapped
        self._rates[name] = adam
        return wrapped

    def minimise(self, name: str, loss: Tensor, *, clip_norm: float | None = None) -> None:
        """One optimiser step of network `name` along −∇loss.

        In 16-mixed a step whose scaled gradients overflow is left out, and the scale lowered. Otherwise gradients that
        are to be clipped must be finite: TrainingDivergedError.
        """
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        if clip_norm is not None:
            scaled = getattr(self.fabric.strategy.precision, "scaler", None) is not None
            norm = self.fabric.clip_gradients(
                self._wrapped[name], optimizer, max_norm=clip_norm, error_if_nonfinite=False
            )
            if not scaled and not bool(cast(Tensor, norm).isfinite()):
                raise TrainingDivergedError(
                    f"train: gradients of {name} must be finite, got a norm of nan or inf; lower the learning rate or "
                    "resume from the run's checkpoints with another seed"
                )
        optimizer.step()

    def best(self, name: str) -> nn.Module:
        """The network to judge and to export: the average where one is kept."""
        return self.averages[name].module if name in self.averages else self.networks[name]

    def _set_adam(self, name: str) -> None:
        adam = self._rates[name]
        for group in self.optimizers[name].param_groups:
            group.update(betas=(adam.beta1, adam.beta2), weight_decay=adam.weight_decay)

    def set_rates(self, step: int, progress: float) -> None:
        for name, adam in self._rates.items():
            for group in self.optimizers[name].param_groups:
                group["lr"] = adam.rate_at(step, progress)

    def agree(self, value: T) -> T:
        """Rank 0's `value`, in every process. All of them have to call this."""
        if self._speech is None:
            return value
        said = [value]
        torch.distributed.broadcast_object_list(said, 0, group=self._speech)
        return said[0]

    def _of_any(self, names: list[str]) -> list[str]:
        """Every process's `names`, each once, in all of them. All of them have to call this."""
        if self._speech is None:
            return names
        said: list[list[str]] = [[] for _ in range(self.fabric.world_size)]
        torch.distributed.all_gather_object(said, names, group=self._speech)
        return list(dict.fromkeys(name for own in said for name in own))

    def not_finite(self, scalars: list[str]) -> list[str]:
        """What must be finite and is not, in any process: each one's own `scalars`, and networks and averages.

        Waits for a GPU, once a network. All processes have to call this.
        """
        found = list(scalars)
        with torch.no_grad():
            for name, network in self.networks.items():
                if not _is_finite(network):
                    found.append(f"weights of {name}")
                elif name in self.averages and not _is_finite(self.averages[name].module):
                    found.append(f"averaged weights of {name}")
        return self._of_any(found)

    def mean_of_scalars(self, scalars: dict[str, float]) -> dict[str, float]:
        """The means over all processes, which must name the same scalars."""
        if self._speech is None:
            return scalars
        values = torch.tensor([scalars[name] for name in sorted(scalars)], dtype=torch.float64)
        torch.distributed.all_reduce(values, group=self._speech)
        means = dict(zip(sorted(scalars), (values / self.fabric.world_size).tolist(), strict=True))
        return {name: means[name] for name in scalars}

    def sum_over_devices(self, value: Tensor) -> Tensor:
        """The sum of every device's `value`, the same bits on all of them; no gradient."""
        total = value.detach().clone()
        if self.fabric.world_size > 1:
            torch.distributed.all_reduce(total)
        return total

    def mean_over_devices(self, value: Tensor) -> Tensor:
        """As `sum_over_devices`, divided by the number of devices."""
        return self.sum_over_devices(value) / self.fabric.world_size

    def _share_statistics(self) -> None:
        """Batch norm saw each device's own batch; its running statistics become the mean of all devices'."""
        for network in self.networks.values():
            layers = [module for module in network.modules() if isinstance(module, _BatchNorm)]
            own = [value for layer in layers for value in (layer.running_mean, layer.running_var) if value is not None]
            if own:
                means = self.mean_over_devices(torch.cat(own)).split([len(value) for value in own])
                for value, mean in zip(own, means, strict=True):
                    value.copy_(mean)

    def update_averages(self) -> None:
        """Once a step, after its last update: move every average."""
        if self.fabric.world_size > 1:
            self._share_statistics()
        for name, average in self.averages.items():
            average.update(self.networks[name])

    def generator(self, stream: str, step: int) -> torch.Generator:
        """A CPU generator for one purpose at one step, different on every rank."""
        seed = derive_seed(self.config.seed, stream, step, self.fabric.global_rank)
        return torch.Generator().manual_seed(seed)

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move a batch; image-shaped tensors become channels_last where the run asks for it."""
        moved = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        if self.config.channels_last:
            for name, value in moved.items():
                if value.ndim == 4 and value.is_floating_point():
                    moved[name] = value.contiguous(memory_format=torch.channels_last)
        return moved

    def state_dict(self) -> dict[str, Any]:
        return {
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "averages": {
                name: {"updates": average.updates, "weights": average.module.state_dict()}
                for name, average in self.averages.items()
            },
            "precision": self.fabric.strategy.precision.state_dict(),  # the loss scale of 16-mixed, otherwise nothing
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave. Raises UsageError when the run has other networks or other shapes."""
        for kind, here in (("networks", self.networks), ("averages", self.averages)):
            if state[kind].keys() != here.keys():
                raise UsageError(
                    f"train: checkpoint must hold {kind} {sorted(here)}, got {sorted(state[kind])}; "
                    "resume with the recipe that made it"
                )
        try:
            for name, network in self.networks.items():
                network.load_state_dict(state["networks"][name])
                self.optimizers[name].load_state_dict(state["optimizers"][name])
                self._set_adam(name)  # the checkpoint brought its own recipe's settings
            for name, average in self.averages.items():
                average.updates = int(state["averages"][name]["updates"])
                average.module.load_state_dict(state["averages"][name]["weights"])
            # Nothing is stored by a run of another precision, or by one from before the scale was: start anew then.
            if scale := state.get("precision"):
                self.fabric.strategy.precision.load_state_dict(scale)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"train: checkpoint must fit the recipe's networks, got {reason}; resume with the recipe that made it"
            ) from error


class Task(ABC, Generic[R]):
    """One thing to train. A task builds its networks through the context and says what a step, a look and a score are.

    `training_step` may call `context.minimise` any number of times on any of its networks, which is all a GAN needs.
    """

    recipe_class: ClassVar[type]

    def __init__(self, recipe: R, context: TrainingContext) -> None:
        self.recipe = recipe
        self.context = context
        # Read now: the file may be gone when the run ends.
        self._trained_on_before = _training_data(getattr(recipe, "initial_weights", None))

    @abstractmethod
    def batch(self, step: int) -> dict[str, Tensor]:
        """The data of step `step`: a function of the seed and the step alone."""

    @abstractmethod
    def training_step(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Update the networks once; returns detached scalars to log."""

    @abstractmethod
    def sample_sheet(self) -> Tensor:
        """Fixed samples under the current weights, uint8 H×W×3."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Scores on data that training never sees."""

    @abstractmethod
    def export(self, path: Path, metrics: dict[str, float]) -> None:
        """Write the network that users load, through `write_weights`."""

    def write_weights(
        self,
        path: Path,
        kind: str,
        config: Any,
        network: nn.Module,
        *,
        training_data: str,
        metrics: Mapping[str, float],
        label_scheme: str = "",
        attributes: tuple[str, ...] = (),
    ) -> None:
        """`faceedit.registry.save_weights`, with what every network that is trained here says of itself; of one that
        went on from other weights also what those were trained on."""
        from faceedit.registry import save_weights

        before = [one for one in self._trained_on_before if one != training_data]

        save_weights(
            path,
            kind,
            config,
            network.state_dict(),
            licence="Apache-2.0",
            training_data=_BEFORE.join([training_data, *before]),
            source="faceedit",
            recipe=self.recipe.description or self.recipe.task,
            label_scheme=label_scheme,
            attributes=attributes,
            metrics=metrics,
        )

    @classmethod
    def prepare(cls, recipe: R, *, report: Report = print) -> None:
        """Build what the task reads from disk (caches), once, before any process is launched. What only the end of the
        run would find missing is looked for first."""

    def resume_at(self, step: int) -> None:
        """Called once a checkpoint's networks are restored, `step` steps into the run: what else follows from that."""


def task_class(name: str) -> type[Task[Any]]:
    """The class of task `name`. Raises UnknownNameError with the closest names."""
    if name not in TASKS:
        raise UnknownNameError(f"train: task must be a known one, got {name!r}; {suggestion(name, TASKS)}")
    module, attribute = TASKS[name].split(":")
    return getattr(importlib.import_module(module), attribute)
