"""``pdserve bench``: offers load to any OpenAI-compatible server and measures how it is answered.

workload (from a rate or a trace) -> prompts -> one call per request, each at its own time ->
samples -> summary with confidence intervals over repeats -> table and JSON file

Load is open: a request is due when the workload says so, whether or not earlier ones were answered,
and its times count from then. A server that falls behind cannot slow the clock it is measured by.
"""
