"""Which of the parts that an answer needs are down."""

from __future__ import annotations

import logging

from redis.asyncio import Redis

from service.engine.client.token_engine import TokenEngine
from tessera.errors import StoreUnavailable
from tessera.redis.client import translate_errors

logger = logging.getLogger(__name__)


async def parts_down(engine: TokenEngine, redis: Redis) -> dict[str, str]:
    """Part → what is the matter, in words that tell a stranger nothing; the log has the reason."""
    down = {}
    if not engine.is_ready:
        down["engine"] = "starting or restarting"
    if not await store_answers(redis):
        down["store"] = "does not answer"
    return down


async def store_answers(redis: Redis) -> bool:
    """One PING, within the client's time-out."""
    try:
        with translate_errors():
            await redis.ping()
    except StoreUnavailable as error:
        logger.warning("%s", error)
        return False
    return True
