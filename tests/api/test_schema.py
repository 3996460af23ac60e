"""No request gives a 5xx status, whether or not the OpenAPI description allows it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.api.conftest import ANN, served

CASES = 2000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what schemathesis itself uses is being deprecated
def test_no_case_of_the_document_is_our_fault(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import schemathesis
        from schemathesis.generation import GenerationMode
    headers = {"Authorization": f"Bearer {ANN}"}
    count, wrong = 0, list[Any]()
    with served(tmp_path, keys=[("ann", ANN)]) as one:
        schema = schemathesis.openapi.from_url(f"{one.url}/openapi.json", headers=headers)
        all_operations: Any = schema.get_all_operations()
        operations = [found.ok() for found in all_operations]
        each = -(-CASES // len(operations)) + 1
        for operation in operations:
            for mode in GenerationMode:

                @settings(
                    max_examples=each,
                    deadline=None,
                    database=None,
                    derandomize=True,
                    suppress_health_check=list(HealthCheck),
                    phases=[Phase.generate],
                )
                @given(case=operation.as_strategy(generation_mode=mode))
                def tried(case: Any) -> None:
                    nonlocal count
                    if isinstance(case.body, dict) and "messages" in case.body and count % 4:
                        case.body["model"] = "ragcache"  # most get beyond the model's name
                    if isinstance(case.body, dict) and "mode" in case.body and count % 4:
                        case.body["mode"] = "fused"
                    response = case.call(headers=headers)
                    count += 1
                    if response.status_code >= 500:
                        wrong.append((response.status_code, case.method, case.path, response.text))

                try:
                    tried()
                except Exception as error:
                    if "Unsatisfiable" not in type(error).__name__:  # nothing it could break
                        raise
    assert wrong == [] and count >= CASES, (count, wrong[:5])
