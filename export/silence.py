"""Nothing is reported to anyone: turns off the usage reports of all dependencies, here and in child processes.

Every package imports this before anything else. Most libraries look at these variables when they are imported; ONNX
Runtime starts a thread then, which its own function for turning reports off does not stop.
"""

import os
import sys

SETTINGS = {
    "BENTOML_DO_NOT_TRACK": "True",
    "DO_NOT_TRACK": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "ORT_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "WANDB_ERROR_REPORTING": "false",
}

os.environ.update(SETTINGS)

# The command `bentoml` has read its variable before it imports the service, and remembers it.
if usage := sys.modules.get("bentoml._internal.utils.analytics.usage_stats"):
    usage.do_not_track.cache_clear()
