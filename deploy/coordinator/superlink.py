"""The SuperLink on this machine: asking it, through Flower's control interface on the loopback.

Flower's own command line says the same to it, but exits 0 for a run that failed to start, knows no
public keys of nodes, and costs a process of two seconds per word.
"""

from __future__ import annotations

import hashlib
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
from flwr.common.serde import fab_to_proto, run_from_proto, user_config_to_proto
from flwr.proto import control_pb2 as control
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from common.errors import FedwardError
from deploy.coordinator.layout import CoordinatorFolder
from simulations.flower import LOCAL


class SuperLinkError(FedwardError):
    """The SuperLink does not answer, or declines."""

    code = "superlink"


class NodeKeyError(SuperLinkError):
    """Node keys that Flower declines; all others are registered."""


@dataclass(frozen=True)
class Node:
    """A SuperNode that is registered.

    Attributes:
        public_key: PEM.
        online: Whether its heart beats.
    """

    id: int
    public_key: bytes
    online: bool


class SuperLink:
    """Conversation with the SuperLink of a coordinator's folder. Use `connected`."""

    def __init__(self, client: ControlHttpClient) -> None:
        self._client = client

    @classmethod
    @contextmanager
    def connected(cls, folder: CoordinatorFolder) -> Iterator[SuperLink]:
        """Raises `SuperLinkError`, here or from any method, where it cannot be asked."""
        # httpx would ask the proxy for this machine, and minds the lower case first.
        os.environ.update(NO_PROXY=LOCAL, no_proxy=LOCAL)
        client = ControlHttpClient.from_server_address(
            server_address=f"localhost:{folder.config().superlink_port}",
            insecure=False,
            root_certificates=folder.authority.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )
        try:
            yield cls(client)
        except httpx.HTTPStatusError as error:
            said = FlowerError.from_json(error.response.text)
            why = said.public_details or said.message if said else str(error)
            raise SuperLinkError(f"the SuperLink declines: {why}") from None
        except httpx.HTTPError as error:
            raise SuperLinkError(
                f"the SuperLink does not answer ({type(error).__name__})",
                cure="run `fedward coordinator serve`; its log is logs/superlink.log",
            ) from None
        finally:
            client.close()

    # -- nodes -------------------------------------------------------------------------------

    def nodes(self) -> list[Node]:
        """Those that are registered now."""
        found = self._client.ListNodes(control.ListNodesRequest()).nodes_info
        return [
            Node(n.node_id, n.public_key, n.status == "online")
            for n in found
            if n.status != "unregistered"
        ]

    def reconcile(self, enrolled: Mapping[str, bytes]) -> None:
        """Registers the nodes of enrolled sites and unregisters all others.

        Args:
            enrolled: Public key of its node, PEM, by site.

        Raises:
            NodeKeyError: After all others were seen to: some were unregistered once, as where an
                older sites.json was restored.
        """
        there = {node.public_key: node.id for node in self.nodes()}
        for key, node in there.items():
            if key not in enrolled.values():
                self._client.UnregisterNode(control.UnregisterNodeRequest(node_id=node))
        missing = {site: key for site, key in enrolled.items() if key not in there}
        declined = [site for site, key in missing.items() if not self._register(site, key)]
        if declined:
            raise NodeKeyError(
                f"Flower takes no node key twice: that of {', '.join(declined)} was unregistered",
                cure="`revoke` and `invite` the site, which makes new keys; or remove "
                "superlink.sqlite* while nothing is served",
            )

    def _register(self, site: str, key: bytes) -> bool:
        try:
            self._client.RegisterNode(control.RegisterNodeRequest(public_key=key, name=site))
        except httpx.HTTPStatusError as error:
            said = FlowerError.from_json(error.response.text)
            if said is None or said.code != ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
                raise
            return False
        return True

    # -- runs --------------------------------------------------------------------------------

    def start(self, bundle: bytes, config: Mapping[str, str | bool]) -> int:
        """Submits the bundle with a run configuration; returns Flower's number of the run."""
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        request = control.StartRunRequest(
            fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(config))
        )
        answer = self._client.StartRun(request)
        if not answer.HasField("run_id"):
            raise SuperLinkError(f"the SuperLink took no run: {answer.note or 'no reason given'}")
        return int(answer.run_id)

    def stop(self, number: int) -> None:
        """Ends a run."""
        if not self._client.StopRun(control.StopRunRequest(run_id=number)).success:
            raise SuperLinkError(f"Flower could not stop its run {number}")

    def states(self) -> dict[int, str]:
        """What Flower says of each run: `pending`, `starting`, `running` or `finished:<how>`,
        followed by its reason, if there is one."""
        runs = self._client.ListRuns(control.ListRunsRequest()).run_dict.values()
        states = {}
        for run in map(run_from_proto, runs):
            how = f":{run.status.sub_status}" if run.status.sub_status else ""
            states[int(run.run_id)] = f"{run.status.status}{how} {run.status.details}".strip()
        return states


def healthy(folder: CoordinatorFolder) -> bool:
    """Whether the SuperLink answers on its health path, with this federation's certificate."""
    trusted = ssl.create_default_context(cafile=str(folder.authority))
    url = f"https://localhost:{folder.config().superlink_port}/health"
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusted)
    )
    try:
        with opener.open(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
