"""The reference REALM model (Guu et al. 2020): a retriever and a reader that learn together from masked spans.

`retriever` embeds queries and blocks, `reader` fills masks with a block beside them, `objective` marginalises over the
candidates, `cloze` is the retriever's warm start, `span_reader` answers open questions (section 3.4). Nothing here
knows a database: `retrodb.realm` feeds it.
"""

from retrodb.model.realm.config import RealmConfig
from retrodb.model.realm.objective import Marginal, marginalise
from retrodb.model.realm.packing import Texts, pack
from retrodb.model.realm.realm import Realm

__all__ = ["Marginal", "Realm", "RealmConfig", "Texts", "marginalise", "pack"]
