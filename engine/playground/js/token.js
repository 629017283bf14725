// The token that a service beyond loopback wants: asked for once a tab, never part of an address.

import { find } from "./dom.js";
import { keepToken, token } from "./identity.js";

/** Asks for the token until `attempt`, which calls the service with it, succeeds. */
export function askToken(attempt) {
  const dialog = find("token-dialog");
  const field = find("token");
  const said = find("token-said");
  said.textContent = token() ? "The service does not know that token." : "";
  dialog.showModal();
  field.focus();
  return new Promise((resolve) => {
    find("token-form").onsubmit = async (event) => {
      event.preventDefault();
      keepToken(field.value.trim());
      try {
        const found = await attempt();
        field.value = "";
        dialog.close();
        resolve(found);
      } catch (error) {
        said.textContent =
          error.status === 401 ? "The service does not know that token." : error.message;
        field.select();
      }
    };
    dialog.oncancel = (event) => event.preventDefault(); // nothing works without it
  });
}
