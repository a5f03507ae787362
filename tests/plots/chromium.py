"""Open pages in Chromium (Qt's) and print for each, as JSON, whether a script called `alert`.

QT_QPA_PLATFORM=offscreen python chromium.py PAGE.html ...
"""

import json
import os
import sys
from pathlib import Path

from PyQt6.QtCore import QEventLoop, QTimer, QUrl
from PyQt6.QtWebEngineCore import QWebEngineScript
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

SETTLE_MS = 1000  # for images that cannot be loaded
VIEWS: list[QWebEngineView] = []  # kept to the end


def called_alert(page: Path) -> bool:
    view, loop, answers = QWebEngineView(), QEventLoop(), []
    watch = QWebEngineScript()
    watch.setSourceCode("window.alert = () => { window.called = true }")
    watch.setInjectionPoint(QWebEngineScript.InjectionPoint.DocumentCreation)
    watch.setWorldId(QWebEngineScript.ScriptWorldId.MainWorld)
    view.page().scripts().insert(watch)
    view.loadFinished.connect(lambda _: QTimer.singleShot(SETTLE_MS, loop.quit))
    view.load(QUrl.fromLocalFile(str(page)))
    loop.exec()
    view.page().runJavaScript("window.called === true", lambda called: (answers.append(called), loop.quit()))
    loop.exec()
    VIEWS.append(view)
    return answers[0]


if __name__ == "__main__":
    app = QApplication(sys.argv[:1])
    print(json.dumps([called_alert(Path(page).resolve()) for page in sys.argv[1:]]), flush=True)
    os._exit(0)  # Qt is not always torn down in an order that it survives
