"""Spectra: what one site of several domains can be cut down to, at which price and which error.

With X_t = A_t W_t the matrices in coordinates where the output's error is a plain sum of squares
(W_t = C_t^(1/2) of the inputs' covariance, or 1), the left directions are those of [X_1 ... X_T],
the right ones those of the X_t on top of each other (Eckart and Young, 1936; for both sides HOSVD,
De Lathauwer et al., 2000). Shared right directions need one W but for a factor: that of the mean
covariance of all domains, each of unit strength, times t's. r left directions cost r (o + T i)
numbers and lose the discarded s^2; p and q on both sides o p + q i + T p q. A site may also stay as
it was.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .adapters.shared import LEFT, RIGHT, Share
from .budget import Menu

RIDGE = 1e-6  # of the mean variance, added to every input direction: unseen ones are not free
AS_IT_WAS = (0, 0)
Directions = tuple[int, int]  # kept on the output's and on the input's side
Pairs = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Spectrum:
    """The matrices of several domains at one site, decomposed.

    Args:
        share: the side whose directions are shared.
        a_doi: the matrices, in float64.
        covariances_dii: of the inputs; None for white ones.
        scales_d: what each domain's squared error counts.
        n_numbers: what the matrices cost as they are.
        limits: directions at most, output and input.
    """

    share: Share
    a_doi: Tensor
    covariances_dii: Tensor | None
    scales_d: Tensor
    n_numbers: int
    limits: Directions
    left_oo: Tensor
    right_ii: Tensor
    unroot_ii: Tensor | None  # W^-1, where the inputs are not white
    kept: np.ndarray[tuple[int, int], np.dtype[np.float64]]  # energy of the first p x q directions

    @classmethod
    def of(
        cls,
        share: Share,
        a_doi: Tensor,
        covariances_dii: Tensor | None,
        scales_d: Tensor,
        n_numbers: int,
        max_rank: int,
    ) -> "Spectrum":
        """`max_rank`: what the domains' ranks add up to at most."""
        n_domains, o, i = a_doi.shape
        limits = min(o, n_domains * i, max_rank), min(i, n_domains * o, max_rank)
        if covariances_dii is not None:
            ridge_d = RIDGE * _mean_variances(covariances_dii)
            covariances_dii = covariances_dii + ridge_d[:, None, None] * torch.eye(i).to(a_doi)
        x_doi, unroot_ii = _weighted(share, a_doi, covariances_dii, scales_d)
        left_oo, right_ii = torch.eye(o).to(a_doi), torch.eye(i).to(a_doi)
        if share != "input":
            left_oo = _directions((x_doi @ x_doi.mT).sum(0))
        if share != "output":
            right_ii = _directions((x_doi.mT @ x_doi).sum(0))
        energies_oi = (left_oo.mT @ x_doi @ right_ii).square().sum(0)
        kept = energies_oi.cumsum(0).cumsum(1).cpu().numpy()
        return cls(
            share, a_doi, covariances_dii, scales_d, n_numbers, limits,
            left_oo, right_ii, unroot_ii, kept,
        )  # fmt: skip

    def cost(self, directions: Directions) -> int:
        """Numbers of the shared factors and of every domain's own."""
        if directions == AS_IT_WAS:
            return self.n_numbers
        return int(self._costs(np.array([directions]))[0])

    def _costs(self, directions: Pairs) -> Pairs:
        n_domains, o, i = self.a_doi.shape
        p, q = directions[:, 0], directions[:, 1]
        if self.share == "output":
            return p * (o + n_domains * i)
        if self.share == "input":
            return q * (i + n_domains * o)
        return o * p + q * i + n_domains * p * q

    def offers(self) -> Pairs:
        """Directions at which the site costs less than as it was, and that."""
        _, o, i = self.a_doi.shape
        rows = [o] if self.share == "input" else range(1, self.limits[0] + 1)
        columns = [i] if self.share == "output" else range(1, self.limits[1] + 1)
        pairs = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
        return np.append(pairs[self._costs(pairs) < self.n_numbers], [AS_IT_WAS], axis=0)

    def menu(self) -> Menu:
        """What `offers` cost in numbers and keep in energy, in their order."""
        pairs = self.offers()[:-1]
        energies = self.kept[pairs[:, 0] - 1, pairs[:, 1] - 1]
        return Menu(
            np.append(self._costs(pairs), self.n_numbers).astype(np.float64),
            np.append(energies, self.kept[-1, -1]),
        )

    def offer(self, place: int) -> Directions:
        """The directions at one place of the menu."""
        p, q = self.offers()[place].tolist()
        return p, q

    def fraction(self, fraction: float) -> Directions:
        """The same share of the possible directions on every shared side, one at least; as it was
        where they would cost no less."""
        p, q = (max(1, round(fraction * limit)) for limit in self.limits)
        _, o, i = self.a_doi.shape
        found = {"output": (p, i), "input": (o, q), "both": (p, q)}[self.share]
        return found if self.cost(found) < self.n_numbers else AS_IT_WAS

    def factors(self, directions: Directions) -> dict[str, Tensor]:
        """The shared factors, orthonormal where the inputs are white."""
        p, q = directions
        right_ri = self.right_ii[:, :q].mT
        if self.unroot_ii is not None:
            right_ri = right_ri @ self.unroot_ii
        found = {LEFT: self.left_oo[:, :p], RIGHT: right_ri}
        unshared = {"output": RIGHT, "input": LEFT, "both": ""}[self.share]
        return {name: factor for name, factor in found.items() if name != unshared}

    def own_factors(self, factors: Mapping[str, Tensor]) -> list[Tensor]:
        """The best own factor of every domain over `factors`."""
        return own_factors(self.a_doi, factors, self.covariances_dii)

    def error(self, factors: Mapping[str, Tensor], own: list[Tensor]) -> float:
        """Root of the outputs' squared error over their energy: 0 exact, 1 nothing left."""
        lost_doi = torch.stack([product(factors, g) for g in own]) - self.a_doi
        energy = float(self._energy(self.a_doi))
        return (float(self._energy(lost_doi)) / energy) ** 0.5 if energy else 0.0

    def _energy(self, d_doi: Tensor) -> Tensor:
        x_doi = d_doi if self.covariances_dii is None else d_doi @ self.covariances_dii
        return ((x_doi * d_doi).sum((1, 2)) * self.scales_d).sum().clamp_min(0)


def own_factors(
    a_doi: Tensor, factors: Mapping[str, Tensor], covariances_dii: Tensor | None
) -> list[Tensor]:
    """Every G_t that minimises the error of A_t = L G_t R's outputs: least squares, both sides."""
    g_drs = torch.linalg.pinv(factors[LEFT]) @ a_doi if LEFT in factors else a_doi
    if RIGHT in factors and covariances_dii is None:
        g_drs = g_drs @ torch.linalg.pinv(factors[RIGHT])
    elif RIGHT in factors and covariances_dii is not None:
        r_ri = factors[RIGHT]
        seen_dri = r_ri @ covariances_dii
        g_drs = torch.linalg.lstsq(seen_dri @ r_ri.mT, seen_dri @ g_drs.mT).solution.mT
    return list(g_drs)


def product(factors: Mapping[str, Tensor], g: Tensor) -> Tensor:
    """L G R, of the factors that there are."""
    a_oi = factors[LEFT] @ g if LEFT in factors else g
    return a_oi @ factors[RIGHT] if RIGHT in factors else a_oi


def _directions(gram: Tensor) -> Tensor:
    """Orthonormal columns, those of the most energy first."""
    return torch.linalg.eigh(gram).eigenvectors.flip(-1)


def _mean_variances(covariances_dii: Tensor) -> Tensor:
    """(d): every domain's over its inputs; 1 where nothing was active."""
    mean_d = covariances_dii.diagonal(dim1=1, dim2=2).mean(1)
    return torch.where(mean_d > 0, mean_d, torch.ones_like(mean_d))


def _weighted(
    share: Share, a_doi: Tensor, covariances_dii: Tensor | None, scales_d: Tensor
) -> tuple[Tensor, Tensor | None]:
    """X_t, and W^-1 where the right directions need it: one W for all domains then."""
    x_doi = a_doi * scales_d.sqrt()[:, None, None]
    if covariances_dii is None:
        return x_doi, None
    if share == "output":
        return x_doi @ torch.stack([_power(c_ii, 0.5) for c_ii in covariances_dii]), None
    # every domain at its own strength: a network of large activations has small matrices
    strengths_d11 = _mean_variances(covariances_dii)[:, None, None]
    common_ii = (covariances_dii / strengths_d11).mean(0)
    return x_doi * strengths_d11.sqrt() @ _power(common_ii, 0.5), _power(common_ii, -0.5)


def _power(c_ii: Tensor, power: float) -> Tensor:
    """C^power of a symmetric C with positive eigenvalues."""
    values_i, vectors_ii = torch.linalg.eigh(c_ii)
    # rounding may take an eigenvalue below the ridge that was added to it
    values_i = values_i.clamp_min(RIDGE / 10 * float(values_i.mean()))
    return (vectors_ii * values_i**power) @ vectors_ii.mT
