"""The same interface where memory can't be managed: plain shared memory, without recovery. Nothing here is Linux's alone.

`Manager(required=False)` is this where userfaultfd can't be had, and on other systems. What fails is as it is without
hwpoison: nothing is isolated, read again or told, and nothing is ever lost as far as is known here. What each module is for,
`hwpoison.app` has a module of that name for; `folder` takes the place of the manager's process.
"""
