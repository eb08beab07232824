"""Leftovers are answers that are none: an error message of some program, or a teacher's refusal to answer."""

import re

# What may stand before a question or an answer
LABEL = re.compile(r"\s*(问题?|提问|回?答|用户|助手|[qabcd]|question|answer|user|human|assistant|bot)\s*[:：]\s*", re.I)

# How an answer begins that is none, in lower case with straight apostrophes.
CUT_OFF = (  # also as the last line of an answer that was cut off
    r"(?:an? )?(?:(?:internal )?server|network|connection|gateway|unknown|unexpected) error",
    r"there was an error generating a response|(?:the )?(?:request|connection) (?:has )?timed out",
    r"网络(?:连接)?(?:错误|异常|超时|失败|繁忙)|(?:请求|连接)(?:超时|失败|过于频繁)",
)
ERRORS = (
    r"(?:(?:http|error|status|code)[ :]+)+[45]\d\d\b[^\n]{0,60}|bad gateway|gateway time-?out|too many requests",
    r"service (?:temporarily )?unavailable|rate limit (?:exceeded|reached)|an error (?:has )?occurred",
    r"something went wrong|(?:发生|出现)了?(?:未知)?错误|出错了",
    r"(?:服务器?|系统)(?:内部)?(?:错误|异常|繁忙|超时|开小差了?)",
    r"doctype html|html|error\"",  # of a page, or of {"error": ...}: marks before them are left out
)
CANNOT = r"(?:can't|cannot|can not|won't|don't|do not|am unable|am not able|'m unable|'m not able)"
SORRY_ZH = r"(?:很|非常|十分|真的)?(?:抱歉|对不起|不好意思)[,，。!！ ]*"
REFUSALS = (
    rf"(?:i'm |i am )?(?:(?:very|so|really) )?sorry,? (?:but )?(?:as an ai\b|(?:i|we) ?{CANNOT})",
    rf"i apologi[sz]e,? (?:but )?(?:i|we) ?{CANNOT}",
    rf"i ?{CANNOT} (?:to )?(?:assist|help|provide|fulfil|comply|answer|do that|create|generate|discuss|engage)",
    rf"as an? (?:ai|artificial intelligence|large language model|language model)\b[^.]{{0,40}}\b(?:i|we) ?{CANNOT}",
    rf"{SORRY_ZH}(?:作为.{{0,16}}[,，]|(?:这个|该|您的|你的)(?:问题|请求|内容))?(?:但是?)?我?(?:暂时|目前|还|现在)?(?:无法|不能|没办法)",
    rf"(?:{SORRY_ZH})?作为(?:一个|一名|一款)?(?:大型?)?(?:ai|人工智能|语言模型).{{0,16}}我(?:还|暂时)?(?:无法|不能|没有|不会)",
    r"我(?:暂时|目前|还)?(?:无法|不能)(?:回答|提供|满足|协助|帮助|完成|生成|讨论|访问)",
)
CUT = re.compile(rf"(?:{'|'.join(CUT_OFF)})\W*")
# A message ends here, or goes on after a mark or with one of these words; "network errors are ..." is a subject.
ERROR = re.compile(
    rf"(?:{'|'.join(CUT_OFF + ERRORS)})(?=$|\s*[^\w\s]|\s+(?:please|while|when|try|occurred|has)\b|\s*请)"
)
REFUSAL = re.compile("|".join(REFUSALS))
ERROR_LENGTH, REFUSAL_LENGTH = 160, 300  # characters of the whole answer: a longer one says something besides


def is_leftover(answer: str) -> bool:
    """An answer is a leftover if it is short and begins as an error message or a refusal, or its last line is an error
    message."""
    text = re.sub(r"^\W+", "", LABEL.sub("", answer[:1000], count=1) if LABEL.match(answer) else answer[:1000])
    start = text.casefold().replace("’", "'")
    last = next((line for line in reversed(answer[-200:].casefold().splitlines()) if re.search(r"\w", line)), "")
    return bool(
        (len(answer) <= ERROR_LENGTH and ERROR.match(start))
        or (len(answer) <= REFUSAL_LENGTH and REFUSAL.match(start))
        or CUT.fullmatch(last.strip())
    )
