"""Each internal part of Flower that fedpeft stands on, checked against the pinned version.

These parts are not Flower's public API. When the pin moves, the tests here say
what changed before a clinic finds out.
"""

import dataclasses
import importlib
import inspect
import logging
from importlib import metadata

import pytest

from fedpeft import flower_pin
from fedpeft.errors import FlowerPinError

PIN = (
    f"fedpeft is pinned to flwr {flower_pin.PINNED_FLOWER}, whose internals it uses: "
    "before moving the pin, adapt the network link to what this test names"
)

CALLABLES = {
    # name -> parameters that are passed, by name or in this order
    "flwr.app.message:remove_content_from_message": ["message"],
    "flwr.app.message:make_message": ["metadata", "content", "error"],
    "flwr.common.serde:message_from_proto": ["message_proto"],
    "flwr.common.serde:message_to_proto": ["message"],
    "flwr.common.serde:run_from_proto": ["run_proto"],
    "flwr.supercore.inflatable.inflatable_object:get_all_nested_objects": ["obj"],
    "flwr.supercore.inflatable.inflatable_object:get_object_tree": ["obj"],
    "flwr.supercore.inflatable.inflatable_object:iterate_object_tree": ["tree"],
    "flwr.supercore.inflatable.inflatable_object:no_object_id_recompute": [],
    "flwr.supercore.inflatable.inflatable_utils:inflate_object_from_contents": [
        "object_id",
        "object_contents",
    ],
    "flwr.supercore.inflatable.inflatable_utils:pull_objects": [
        "object_ids",
        "pull_object_fn",
        "initial_backoff",
        "backoff_cap",
    ],
    "flwr.supercore.inflatable.inflatable_utils:push_objects": [
        "objects",
        "push_object_fn",
        "object_ids_to_push",
    ],
    "flwr.supercore.inflatable.inflatable_utils:ObjectPullError": ["object_id", "reason"],
    "flwr.supercore.inflatable.inflatable_utils:ObjectPushError": [
        "object_id",
        "run_id",
        "session_id",
    ],
    "flwr.supercore.inflatable.inflatable_utils:ObjectUnavailableError": ["object_id"],
    "flwr.supercore.interceptors:RuntimeVersionHttpInterceptor": ["component_name"],
    "flwr.supercore.primitives.asymmetric:public_key_to_bytes": ["public_key"],
    "flwr.supercore.primitives.asymmetric:sign_message": ["private_key", "message"],
    "flwr.superlink.auth_plugin:NoOpControlAuthnPlugin": [],
    "flwr.superlink.cli.flower_superlink:SuperLinkLifespan": ["config", "state_factory"],
    "flwr.superlink.main:create_app": ["config", "superlink_lifespan_class"],
}

LINK_STATE = {
    "acknowledge_task_heartbeat": ["task_id"],
    "activate_task": ["task_id"],
    "claim_task": ["task_id"],
    "cleanup_run": ["run_id"],
    "create_node": ["owner_aid", "owner_name", "public_key", "heartbeat_interval"],
    "create_run": [
        "fab_id",
        "fab_version",
        "fab_hash",
        "override_config",
        "federation_id",
        "federation_config",
        "flwr_aid",
        "primary_task_type",
    ],
    "delete_messages": ["message_ins_ids"],
    "finish_task": ["task_id", "sub_status", "details"],
    "get_message_res": ["message_ids", "run_id"],
    "get_node_id_by_public_key": ["public_key"],
    "get_node_info": ["statuses"],
    "get_object": ["run_id", "object_id"],
    "get_run_info": ["run_ids", "statuses"],
    "get_tasks": ["run_ids"],
    "start_session": ["run_id"],
    "stop_run": ["run_id"],
    "store_message_and_object_tree": ["message", "object_tree", "session_id"],
    "store_object": ["run_id", "session_id", "object_id", "object_content"],
}

CONSTANTS = {
    "flwr.common.constant:HEARTBEAT_DEFAULT_INTERVAL": 30,
    "flwr.common.constant:NOOP_ACCOUNT_NAME": "none",
    "flwr.common.constant:NOOP_FLWR_AID": "<id:none>",
    "flwr.common.constant:SUPERLINK_NODE_ID": 1,
    "flwr.common.constant:SYSTEM_TIME_TOLERANCE": 5,
    "flwr.common.constant:TIMESTAMP_HEADER": "flwr-timestamp",
    "flwr.common.constant:TIMESTAMP_TOLERANCE": 300,
    "flwr.common.constant:TRANSPORT_TYPE_GRPC_RERE": "grpc-rere",
    "flwr.supercore.constant:FLEET_HTTP_PUBLIC_KEY_HEADER": "flwr-public-key",
    "flwr.supercore.constant:FLEET_HTTP_SIGNATURE_HEADER": "flwr-signature",
    "flwr.supercore.constant:NOOP_FEDERATION_ID": "@none/default",
}

FLEET_CALLS = {
    "ActivateNode": "/v1/fleet/activate-node",
    "ConfirmMessageReceived": "/v1/fleet/confirm-message-received",
    "DeactivateNode": "/v1/fleet/deactivate-node",
    "GetRun": "/v1/fleet/get-run",
    "PullMessages": "/v1/fleet/pull-messages",
    "PullObject": "/v1/fleet/pull-object",
    "PushMessages": "/v1/fleet/push-messages",
    "PushObject": "/v1/fleet/push-object",
    "SendNodeHeartbeat": "/v1/fleet/send-node-heartbeat",
}

MESSAGES = {
    "fleet_pb2:ActivateNodeRequest": {"public_key", "heartbeat_interval"},
    "fleet_pb2:ActivateNodeResponse": {"node_id"},
    "fleet_pb2:DeactivateNodeRequest": {"node_id"},
    "fleet_pb2:PullMessagesRequest": {"node"},
    "fleet_pb2:PullMessagesResponse": {"messages_list", "message_object_trees"},
    "fleet_pb2:PushMessagesRequest": {
        "node",
        "messages_list",
        "message_object_trees",
        "clientapp_runtime_list",
    },
    "fleet_pb2:PushMessagesResponse": {"objects_to_push", "session_id"},
    "heartbeat_pb2:SendNodeHeartbeatRequest": {"node", "heartbeat_interval"},
    "message_pb2:ConfirmMessageReceivedRequest": {"node", "run_id", "message_object_id"},
    "message_pb2:ObjectTree": {"object_id", "children"},
    "message_pb2:PullObjectRequest": {"node", "run_id", "object_id"},
    "message_pb2:PullObjectResponse": {"object_found", "object_available", "object_content"},
    "message_pb2:PushObjectRequest": {
        "node",
        "run_id",
        "object_id",
        "object_content",
        "session_id",
    },
    "message_pb2:PushObjectResponse": {"stored"},
    "node_pb2:Node": {"node_id"},
    "run_pb2:GetRunRequest": {"node", "run_id"},
    "run_pb2:GetRunResponse": {"run"},
}


def find(name: str):
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{name} is gone ({error}). {PIN}")


def parameters(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_pinned_version_is_installed():
    flower_pin.require_pinned_flower()
    assert metadata.version("flwr") == flower_pin.PINNED_FLOWER


@pytest.mark.parametrize("installed", ["1.40.0", "1.41.1", "1.42.0"])
def test_other_version_is_refused_with_the_remedy(monkeypatch, installed):
    monkeypatch.setattr(metadata, "version", lambda _name: installed)

    with pytest.raises(FlowerPinError, match=rf"{installed}.*pip install flwr==1\.41\.0"):
        flower_pin.require_pinned_flower()


def test_missing_flower_is_refused(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)

    with pytest.raises(FlowerPinError, match="but none is installed"):
        flower_pin.require_pinned_flower()


@pytest.mark.parametrize(("name", "expected"), CALLABLES.items())
def test_internal_function_takes_what_is_passed(name, expected):
    found = parameters(find(name))

    missing = [each for each in expected if each not in found]
    assert not missing, f"{name} no longer takes {missing}, only {found}. {PIN}"


@pytest.mark.parametrize(
    "name",
    [
        "flwr.common.serde:message_from_proto",
        "flwr.supercore.inflatable.inflatable_utils:push_objects",
        "flwr.supercore.inflatable.inflatable_utils:pull_objects",
        "flwr.superlink.main:create_app",
    ],
)
def test_positional_arguments_stand_in_the_known_order(name):
    expected = CALLABLES[name][:2]
    assert parameters(find(name))[: len(expected)] == expected, f"{name}: order changed. {PIN}"


@pytest.mark.parametrize(("name", "expected"), LINK_STATE.items())
def test_message_store_has_the_method(name, expected):
    state = find("flwr.server.superlink.linkstate:LinkState")
    method = getattr(state, name, None)
    assert method is not None, f"LinkState.{name} is gone. {PIN}"

    found = parameters(method)
    missing = [each for each in expected if each not in found]
    assert not missing, f"LinkState.{name} no longer takes {missing}, only {found}. {PIN}"


@pytest.mark.parametrize("name", ["get_object_tree", "delete"])
def test_object_store_has_the_method(name):
    store = find("flwr.supercore.object_store:ObjectStore")
    assert parameters(getattr(store, name, len)) == ["object_id"], f"ObjectStore.{name}. {PIN}"


@pytest.mark.parametrize(("name", "value"), CONSTANTS.items())
def test_constant_has_the_value_that_is_relied_on(name, value):
    assert find(name) == value, f"{name} changed. {PIN}"


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("flwr.common.constant:Status", {"PENDING": "pending", "RUNNING": "running"}),
        ("flwr.common.constant:SubStatus", {"COMPLETED": "completed", "FAILED": "failed"}),
        ("flwr.supercore.constant:NodeStatus", {"ONLINE": "online"}),
        ("flwr.supercore.constant:TaskType", {"SERVER_APP": "flwr-serverapp"}),
        ("flwr.supercore.error:ApiErrorCode", {"FLEET_NODE_ACTIVATION_FAILED": 2004}),
        (
            "flwr.common.constant:ErrorCode",
            {
                "CLIENT_APP_RAISED_EXCEPTION": 2,
                "MESSAGE_UNAVAILABLE": 3,
                "NODE_UNAVAILABLE": 5,
            },
        ),
    ],
)
def test_named_code_has_the_value_that_is_relied_on(name, members):
    found = {each: getattr(find(name), each, None) for each in members}
    assert found == members, f"{name} changed. {PIN}"


@pytest.mark.parametrize(("name", "fields"), MESSAGES.items())
def test_wire_message_has_the_fields(name, fields):
    message = find(f"flwr.proto.{name}")
    missing = fields - set(message.DESCRIPTOR.fields_by_name)
    assert not missing, f"{name} has lost {missing}. {PIN}"


@pytest.mark.parametrize(("method", "path"), FLEET_CALLS.items())
def test_call_of_a_clinic_goes_to_the_path_that_the_server_lets_through(method, path):
    client_class = find("flwr.supernode.fleet_http_client:FleetHttpClient")
    seen = {}

    class Recorder(client_class):
        def __init__(self) -> None:
            return

        def _unary_unary(self, **arguments):
            seen.update(arguments)

    getattr(Recorder(), method)(object())

    assert seen["path"] == path, f"FleetHttpClient.{method} goes elsewhere. {PIN}"


def test_client_uses_only_the_attributes_that_are_set_for_it():
    source = inspect.getsource(find("flwr.supercore.protobuf.client:ProtobufClient"))
    assigned = {
        line.split("=")[0].split(":")[0].strip()
        for line in source.split("def from_server_address")[0].splitlines()
        if line.strip().startswith("self._")
    }
    known = {"self._base_url", "self._interceptors", "self._retry_invoker", "self._client"}
    assert assigned == known, f"ProtobufClient.__init__ sets {assigned}. {PIN}"


def test_every_path_of_a_clinic_is_a_route_of_the_server():
    routes = {
        (method, route)
        for method, route in find("flwr.supercore.protobuf.translation:PROTOBUF_REQUEST_TYPES")
    }
    missing = {("POST", path) for path in FLEET_CALLS.values()} - routes
    assert not missing, f"the server has lost {missing}. {PIN}"


def test_server_configuration_has_exactly_the_known_fields():
    config = find("flwr.superlink.config_loader:SuperLinkLifespanConfig")
    names = {each.name for each in dataclasses.fields(config)}
    known = {
        "control_address",
        "health_server_address",
        "host",
        "port",
        "insecure",
        "certificates",
        "superexec_auth_secret",
        "authn_plugin",
        "event_log_plugin",
        "fleet_event_log_plugin",
        "enable_event_log",
        "artifact_provider",
        "enable_supernode_auth",
        "fleet_api_type",
        "fleet_api_address",
        "simulation",
        "ssl_ca_certfile",
        "ssl_certfile",
        "ssl_keyfile",
        "database",
        "isolation",
        "runtime_dependency_install",
    }
    assert names == known, f"SuperLinkLifespanConfig changed by {names ^ known}. {PIN}"


def test_task_identity_is_set_by_assignment():
    identity = find("flwr.supercore.task_identity:TaskIdentity")
    for name in ("task_id", "run_id", "node_id"):
        assert getattr(type(identity), name, None) is not None, f"TaskIdentity.{name}. {PIN}"


def test_id_of_a_message_is_its_metadata_attribute():
    app = importlib.import_module("flwr.app")
    identity = find("flwr.supercore.task_identity:TaskIdentity")
    identity.task_id, identity.run_id, identity.node_id = 1, 1, 1
    message = app.Message(app.RecordDict(), 2, "train")

    message.metadata.__dict__["_message_id"] = "known"

    assert message.metadata.message_id == "known", f"Metadata keeps its id elsewhere. {PIN}"


def test_large_blob_travels_in_parts():
    app = importlib.import_module("flwr.app")
    nested = find("flwr.supercore.inflatable.inflatable_object:get_all_nested_objects")
    data = bytes(range(256)) * 50_000
    array = app.Array(dtype="bytes", shape=(len(data),), stype="x", data=data)

    sizes = [len(each.deflate()) for each in nested(array).values()]

    assert max(sizes) < 8 << 20, f"a part of a blob is {max(sizes)} bytes. {PIN}"


def test_flower_log_is_routed_and_holds_no_parameters(caplog):
    importlib.import_module("flwr.supercore")
    flower_pin.quiet_flower_log()
    log = find("flwr.supercore:log")

    log(logging.INFO, "routine")
    log(logging.ERROR, "[/v1/fleet/activate-node][ApiError:2004] refused")
    log(
        logging.ERROR, "[/v1/x][UnexpectedError:OperationalError] locked\n[parameters: (b'secret')]"
    )

    assert [record.getMessage() for record in caplog.records] == [
        "[/v1/x][UnexpectedError:OperationalError]"
    ]
    assert logging.getLogger("flwr").handlers == []
