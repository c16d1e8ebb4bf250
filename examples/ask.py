# SPDX-License-Identifier: Apache-2.0
"""
Ask a server one question through the OpenAI API.

    python examples/ask.py http://127.0.0.1:8000/v1 "What is the capital of France?"
"""

import argparse

from openai import OpenAI


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("url")
    parser.add_argument("question")
    args = parser.parse_args()

    client = OpenAI(base_url=args.url, api_key="none", timeout=120)
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": args.question}],
        max_tokens=64,
        temperature=0,
    )
    print(f"> {args.question}\n{answer.choices[0].message.content}")


if __name__ == "__main__":
    main()
