"""Controllers: policies over the patterns of a space, which learn from rewards by REINFORCE.

A controller has no files and no random state. Its weights are a function of its arguments and of the calls of `learn`,
in order and bit for bit. Replaying a study's trials restores it.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_ydrop.checks import check_count, check_number, is_real
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.search.decoder import DTYPE, Decoder, values_that_exist, whole
from lightning_ydrop.search.reinforce import Reinforce, Rewards, capped_weight, effective_sample_size, surrogate
from lightning_ydrop.search.space import PatternSpace

# Over how many of the last candidates the effective sample size and the estimate of the entropy are taken.
RECENT_WEIGHTS = 32
RECENT_CANDIDATES = 8


class Policy(Protocol):
    """What a search needs of a controller. Choices are the indices of values, one for each token of `space`."""

    @property
    def space(self) -> PatternSpace:
        """What the policy chooses from."""

    def sample(self, seed: int) -> tuple[list[int], float]:
        """Draw a candidate; return its choices and its log-probability. The same seed draws the same."""

    def log_prob(self, choices: Sequence[int]) -> float:
        """Compute the log-probability of a candidate under the policy of today."""

    def learn(self, choices: Sequence[int], reward: float, log_prob: float | None = None) -> None:
        """Update the policy with a candidate's reward. `log_prob` is what `sample` returned, None if it is lost."""

    def most_likely(self) -> list[int]:
        """Choose the most likely value of each token, one after another."""

    def entropy(self) -> float:
        """Give the mean entropy of a token in nats, or an estimate."""

    @property
    def effective_sample_size(self) -> float:
        """How many equally weighted updates the last ones are worth."""


class ReinforcePolicy(ABC):
    """A policy that learns by REINFORCE, one candidate per update, with Adam.

    Args:
        space: What it chooses from.
        lr: Learning rate of Adam, above 0.
        reinforce: The constants of the update.

    Raises:
        ConfigurationError: If an argument is out of range.

    """

    # Whether the probabilities of a token depend on the choices before it.
    is_autoregressive: bool

    def __init__(self, space: PatternSpace, lr: float, reinforce: Reinforce) -> None:
        owner = type(self).__name__
        for name, value, kind in (("space", space, PatternSpace), ("reinforce", reinforce, Reinforce)):
            if not isinstance(value, kind):
                raise ConfigurationError(
                    f"{owner}({name}={describe(value)}) was given.",
                    f"`{name}` is an instance of {kind.__name__}.",
                    f"Pass, for example, {name}={'PatternSpace({...})' if kind is PatternSpace else 'Reinforce()'}.",
                )
        check_number(owner, "lr", lr, example=3e-3, positive=True)
        self.space = space
        self.lr = float(lr)
        self.reinforce = reinforce
        self._rewards = Rewards(reinforce.baseline_decay)
        self._exists = values_that_exist(space)
        counts = self._exists.sum(1)
        # The entropies of the uniform policy, which comes first.
        self._usual_entropies = counts.to(DTYPE).log()
        self._recent: deque[list[int]] = deque(maxlen=RECENT_CANDIDATES)
        self._weights: deque[float] = deque(maxlen=RECENT_WEIGHTS)
        self._optimizer: torch.optim.Optimizer

    def _learn_with(self, parameters: Iterable[nn.Parameter]) -> None:
        self._optimizer = torch.optim.Adam(parameters, lr=self.lr)

    @abstractmethod
    def _logits(self, choices: Tensor) -> Tensor:
        """Compute logits, (B, T) -> (B, T, N), minus infinity where a token has fewer than N values."""

    @abstractmethod
    def _generate(self, choose: Callable[[int, list[float]], int]) -> list[int]:
        """Choose token after token: `choose` takes a token's position and the probabilities of its values."""

    def sample(self, seed: int) -> tuple[list[int], float]:
        """Draw a candidate.

        Args:
            seed: Seed of this draw. torch's global random stream is not touched.

        Returns:
            The choices, and their log-probability.

        """
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(len(self.space.tokens), generator=generator, dtype=torch.float64, device="cpu").tolist()

        def draw(position: int, probabilities: list[float]) -> int:
            reached = 0.0
            for choice, probability in enumerate(probabilities):
                reached += probability
                if uniform[position] < reached:
                    return choice
            return len(probabilities) - 1  # the sum was rounded to less than 1

        choices = self._generate(draw)
        return choices, self.log_prob(choices)

    def most_likely(self) -> list[int]:
        """Choose the most likely value of each token, given those chosen before it."""
        return self._generate(lambda position, probabilities: probabilities.index(max(probabilities)))

    def log_prob(self, choices: Sequence[int]) -> float:
        """Compute the log-probability of a candidate.

        Args:
            choices: The choices.

        Returns:
            The natural logarithm, 0 or less.

        Raises:
            ConfigurationError: If these are no choices of the space.

        """
        with torch.no_grad():
            log_probs, _ = self._terms(whole([self.space.check_choices(choices)]))
        return log_probs.sum().item()

    def learn(self, choices: Sequence[int], reward: float, log_prob: float | None = None) -> None:
        """Update the policy with the reward of a candidate.

        Args:
            choices: The choices.
            reward: The reward, finite; more is better.
            log_prob: The log-probability when the candidate was drawn. None: the importance weight is 1.

        Raises:
            ConfigurationError: If these are no choices of the space, or a number is not finite.

        """
        choices = self.space.check_choices(choices)
        for name, value in (("reward", reward), ("log_prob", log_prob)):
            if not (is_real(value) or (value is None and name == "log_prob")):
                raise ConfigurationError(
                    f"{type(self).__name__}.learn({name}={describe(value)}) was given.",
                    f"`{name}` is a finite number.",
                    "Give a candidate that diverges a low finite reward: the policy learns to avoid it.",
                )
        reward = float(reward)
        advantage = self._rewards.advantage(reward, self.reinforce.advantage_cap)
        self._rewards.add(reward)
        # Adam of older releases counts its steps on the default device.
        with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
            log_probs, entropies = (terms[0] for terms in self._terms(whole([choices])))
            weight = capped_weight(log_probs.sum().item(), log_prob, self.reinforce.weight_cap)
            loss = -surrogate(
                log_probs,
                entropies,
                advantage=advantage,
                weight=weight,
                entropy_weight=self.reinforce.entropy_weight,
                usual_entropies=self._usual_entropies if self.is_autoregressive else None,
            )
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self._usual_entropies.lerp_(entropies.detach(), 1.0 - self.reinforce.baseline_decay)
        self._recent.append(choices)
        self._weights.append(weight)

    def _terms(self, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Give log pi of each token, and the entropy of each, given those before it: (B, T) -> (B, T), (B, T)."""
        all_log_probs = self._logits(choices).log_softmax(2)
        log_probs = all_log_probs.gather(2, choices.unsqueeze(2)).squeeze(2)
        entropies = -(all_log_probs.exp() * all_log_probs.masked_fill(~self._exists, 0.0)).sum(2)
        return log_probs, entropies

    def entropy(self) -> float:
        """Give the mean entropy of a token.

        Returns:
            Nats. An estimate where tokens depend on each other: the mean over the last candidates learned from.

        """
        recent = list(self._recent) if self.is_autoregressive else []
        with torch.no_grad():
            _, entropies = self._terms(whole(recent or [[0] * len(self.space.tokens)]))
        return entropies.mean().item()

    @property
    def effective_sample_size(self) -> float:
        """How many equally weighted updates the last 32 are worth: fewer where rewards come late."""
        return effective_sample_size(self._weights)

    def state(self) -> dict[str, Any]:
        """Copy all that `learn` changes, to compare controllers by."""
        return {
            "optimizer": deepcopy(self._optimizer.state_dict()["state"]),
            "parameters": [each.detach().clone() for each in self._optimizer.param_groups[0]["params"]],
            "rewards": dict(vars(self._rewards)),
            "usual_entropies": self._usual_entropies.clone(),
            "recent": list(self._recent),
            "weights": list(self._weights),
        }


class TablePolicy(ReinforcePolicy):
    """Independent logits for each token: the control that tells whether the TransformerPolicy earns its keep.

    Args:
        space: What it chooses from.
        lr: Learning rate of Adam, above 0.
        reinforce: The constants of the update.

    Raises:
        ConfigurationError: If an argument is out of range.

    Example:
        >>> policy = TablePolicy(PatternSpace({"stage1.1": "conv"}))
        >>> choices, log_prob = policy.sample(seed=0)
        >>> policy.learn(choices, reward=0.9, log_prob=log_prob)

    """

    is_autoregressive = False

    def __init__(self, space: PatternSpace, lr: float = 0.1, reinforce: Reinforce = Reinforce()) -> None:
        super().__init__(space, lr, reinforce)
        self._table = nn.Parameter(torch.zeros(self._exists.shape, dtype=DTYPE, device="cpu"))
        self._learn_with([self._table])

    def _logits(self, choices: Tensor) -> Tensor:
        return self._table.masked_fill(~self._exists, -torch.inf).expand(len(choices), -1, -1)

    def _generate(self, choose: Callable[[int, list[float]], int]) -> list[int]:
        with torch.no_grad():
            probabilities = self._logits(whole([0]))[0].softmax(1).tolist()
        counts = self._exists.sum(1).tolist()
        return [
            choose(token, row[:count]) for token, (row, count) in enumerate(zip(probabilities, counts, strict=True))
        ]


class TransformerPolicy(ReinforcePolicy):
    """A small causal Transformer that chooses one token after another, each given those before it.

    See Figure 3 of arXiv 2101.01761. We know neither its sizes nor its learning rate: the defaults are ours.

    Args:
        space: What it chooses from.
        lr: Learning rate of Adam, above 0. At 3e-4 some hundred trials teach nothing.
        width: Width of the embeddings, a multiple of `num_heads`.
        num_blocks: How many encoder layers.
        num_heads: Attention heads of each.
        feedforward: Width of their hidden layers.
        seed: Seed of the initial weights. The first policy is uniform with any seed.
        reinforce: The constants of the update.

    Raises:
        ConfigurationError: If an argument is out of range.

    """

    is_autoregressive = True

    def __init__(
        self,
        space: PatternSpace,
        lr: float = 3e-3,
        width: int = 32,
        num_blocks: int = 2,
        num_heads: int = 2,
        feedforward: int = 128,
        seed: int = 0,
        reinforce: Reinforce = Reinforce(),
    ) -> None:
        super().__init__(space, lr, reinforce)
        sizes = {"width": width, "num_blocks": num_blocks, "num_heads": num_heads, "feedforward": feedforward}
        for name, value in sizes.items():
            sizes[name] = check_count("TransformerPolicy", name, value, minimum=1, example=2)
        if sizes["width"] % sizes["num_heads"]:
            raise ConfigurationError(
                f"TransformerPolicy(width={width}, num_heads={num_heads}) was given.",
                "`width` is a multiple of `num_heads`: each head takes an equal share.",
                "Pass, for example, width=32, num_heads=2.",
            )
        self._decoder = Decoder(
            space, **sizes, seed=check_count("TransformerPolicy", "seed", seed, minimum=0, example=0)
        )
        self._learn_with(self._decoder.parameters())

    def _logits(self, choices: Tensor) -> Tensor:
        logits: Tensor = self._decoder(choices)
        return logits

    def _generate(self, choose: Callable[[int, list[float]], int]) -> list[int]:
        return self._decoder.generate(choose)
