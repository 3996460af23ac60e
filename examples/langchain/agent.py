"""An agent with a retriever tool: chunks are passed from tool to model as the message's artifact.

The small model cannot choose tools, so the first step always calls this one, with the message that
a larger model would produce. It also answers only a question that follows its notes, so the last
step asks again. The rest is as in any LangGraph agent.

python -m examples.langchain.agent
"""

from __future__ import annotations

from typing import Any

from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import create_retriever_tool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode

from examples.langchain.chain import QUESTION, TEXTS
from ragcache.langchain import ChatRagCache, RagCacheVectorStore


def build(folder: str) -> Any:
    """The agent's graph: retrieve, then answer."""
    store = RagCacheVectorStore(folder)
    store.add_texts(TEXTS, ids=["holt", "corvex"])
    model = ChatRagCache(store=store)
    notes = create_retriever_tool(
        store.as_retriever(),
        "notes",
        "Search the notes.",
        response_format="content_and_artifact",
    )

    def choose(state: MessagesState) -> dict[str, Any]:
        query = state["messages"][-1].text
        call = {"name": "notes", "args": {"query": query}, "id": "1", "type": "tool_call"}
        return {"messages": [AIMessage("", tool_calls=[call])]}

    async def answer(state: MessagesState) -> dict[str, Any]:
        asked, *_ = state["messages"]
        return {"messages": [await model.ainvoke([*state["messages"], HumanMessage(asked.text)])]}

    graph = StateGraph(MessagesState)
    graph.add_node("choose", choose)
    graph.add_node("tools", ToolNode([notes]))
    graph.add_node("answer", answer)
    for step in ((START, "choose"), ("choose", "tools"), ("tools", "answer"), ("answer", END)):
        graph.add_edge(*step)
    return graph.compile()


async def main(folder: str) -> None:
    state = await build(folder).ainvoke({"messages": [HumanMessage(QUESTION)]})
    answer = state["messages"][-1]
    print(answer.text)
    print("boundaries by", *answer.response_metadata["ragcache"]["boundaries"])


if __name__ == "__main__":
    import asyncio

    asyncio.run(main("langchain-store"))
