"""Real engines as nodes: what vLLM and SGLang publish about their caches, translated to events of the fleet.

`dialect` decodes what they publish, `translate` makes block hashes and events of it, `sequence` notices what is missing and
which life of the engine speaks; these three are pure. `sockets` receives events and asks for replays, `facts` asks over HTTP,
`memory` reads back what the log says and `names` gives it to those that may not read, `adapter` joins them. `complete` sends
requests, `openai` knows their forms.
"""
