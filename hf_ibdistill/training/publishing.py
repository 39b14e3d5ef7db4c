"""How a trainer publishes: through [`push_folder_to_hub`], and without pickles."""

import logging
from pathlib import Path

from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy

from ..publishing.cards import create_model_card
from ..publishing.hub import ensure_repo, push_folder_to_hub


logger = logging.getLogger(__name__)


class PublishingTrainer(Trainer):
    """transformers' `Trainer`, whose pickled arguments would publish the access token in them. Pushes of checkpoints while
    training leave the optimizer's state at home, and wait until they have arrived; if they cannot, training goes on."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f'hub_strategy="{self.args.hub_strategy.value}" would publish pickles of the optimizer\'s state. Choose "end" '
                'or "every_save".'
            )
        if self.is_world_process_zero():
            private = self.args.hub_private_repo if private is None else private
            self.hub_model_id = ensure_repo(self._repo_id(), private=private, token=token or self.args.hub_token)
            # Its whole name, for the card.
            self.args.hub_model_id = self.hub_model_id

    def _repo_id(self) -> str:
        return self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
    ) -> str | None:
        """Publish the model with its image processor and the card that [`evaluate_and_save`] left, or else one without
        results.

        Args:
            blocking: it always waits until everything has arrived.
            token, revision, private: by default `args.hub_token`, `args.hub_revision` and `args.hub_private_repo`.
            commit_message, create_pr: as for [`push_folder_to_hub`], and so are the errors.

        Returns:
            The address of the repository, or of the pull request; `None` in all processes but the first.
        """
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        folder = Path(self.args.output_dir)
        if not (folder / "README.md").exists():
            create_model_card(self.model, {"title": self._repo_id().split("/")[-1]}).save(folder / "README.md")
        return self._push(folder, commit_message, token, revision, private, create_pr)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero() and self.args.hub_strategy == HubStrategy.EVERY_SAVE:
            try:
                self._push(checkpoint_folder, f"Training in progress, step {self.state.global_step}")
            except OSError as error:  # of the network, or of a token that is not valid any more
                logger.warning("%s was not published: %s", checkpoint_folder, error)

    def _push(self, folder, commit_message, token=None, revision=None, private=None, create_pr=False):
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        return push_folder_to_hub(
            folder,
            self._repo_id(),
            commit_message=commit_message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            private=self.args.hub_private_repo if private is None else private,
            create_pr=create_pr,
        )
