"""An upgrade pins the installed code, once it has read the site."""

from __future__ import annotations

import pytest

from common.errors import FedwardError
from deploy.site.layout import SiteFolder
from deploy.site.upgrade import plan_upgrade, upgrade
from simulations import bundle
from tests.deploy.site.life import Life


def test_an_upgrade_pins_the_installed_code_and_nothing_else(site: SiteFolder) -> None:
    before = site.relay.config()
    site.relay.configure(before.model_copy(update={"bundle": "0" * 64}))
    change = plan_upgrade(site.root)
    assert (change.before, change.after) == ("0" * 64, bundle.sha256())
    assert site.relay.config().bundle == "0" * 64
    upgrade(site.root, change)
    assert site.relay.config() == before


@pytest.mark.parametrize("broken", ["site.toml", "policy.toml", "state/ledger.jsonl"])
def test_an_upgrade_that_does_not_read_the_site_changes_nothing(life: Life, broken: str) -> None:
    path = life.site.root / broken
    path.write_text('{"no": "ledger"}\n' if broken.endswith("jsonl") else "unknown_key = 1\n")
    with pytest.raises(FedwardError, match=path.name):
        plan_upgrade(life.site.root)
