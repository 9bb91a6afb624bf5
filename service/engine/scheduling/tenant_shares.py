"""Whose turn it is: deficit round robin over tokens, with rounds of one token and debts.

    charge:  starts_at = max(starts_at, now) + tokens / weight        now = max(now, starts_at before)

A tenant's request may run when its turn has come, and what it may cost (prompt and the longest output) is
owed afterwards: so a newcomer's first request runs at once, and a tenant is passed over for as many rounds as
it has had tokens. What a request did not use is paid back when it ends. Counting in rounds of one token
instead of a quantum, and skipping the rounds in which nobody may run, is the scheme known as start-time fair
queueing (Goyal, Vin, Cheng 1996): while two tenants wait, what they were given differs by no more than one
request of each.

An account lives while its tenant has a request in the engine, so there are no more of them than requests.
Knows no queue and no sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class _Account:
    """starts_at: the round from which on its next request may run. num_requests: in the engine."""

    starts_at: float
    num_requests: int = 0


class TenantShares:
    """Accounts of the tenants that have requests in the engine. weights: shares by tenant, 1 if not named."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._accounts: dict[str, _Account] = {}
        self._now = 0.0

    def __len__(self) -> int:
        return len(self._accounts)

    def enter(self, tenant: str) -> None:
        """A request of the tenant's came into the engine."""
        account = self._accounts.setdefault(tenant, _Account(self._now))
        account.num_requests += 1

    def leave(self, tenant: str, *, unused_tokens: int = 0) -> None:
        """One has ended; unused_tokens were charged for it and not used."""
        account = self._accounts[tenant]
        account.starts_at = max(self._now, account.starts_at - unused_tokens / self._weight(tenant))
        account.num_requests -= 1
        if account.num_requests == 0:
            del self._accounts[tenant]

    def starts_at(self, tenant: str) -> float:
        """The round from which on its next request may run: the lowest is next. Never in the past, so that a
        tenant that could not run for a while does not keep the others out afterwards."""
        return max(self._now, self._accounts[tenant].starts_at)

    def charge(self, tenant: str, tokens: int) -> None:
        """Its next request runs and may cost so many tokens."""
        starts_at = self.starts_at(tenant)
        self._now = starts_at
        self._accounts[tenant].starts_at = starts_at + max(1, tokens) / self._weight(tenant)

    def check_integrity(self, num_requests: Mapping[str, int]) -> None:
        """num_requests: by tenant, as others count them."""
        assert {tenant: a.num_requests for tenant, a in self._accounts.items()} == num_requests

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)
