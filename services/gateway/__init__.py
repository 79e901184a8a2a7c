"""The gateway: requests of OpenAI's and Anthropic's APIs in, each to the engine that the router inside chooses.

`api` reads a request as far as routing needs it, `sessions` finds the conversation it belongs to, `prompt` gets its tokens,
`usage` reads what an answer counts while it passes, `forward` tries engines until one answers, `service` joins them.
"""
