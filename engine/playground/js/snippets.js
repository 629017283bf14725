// Programs that make the same clip: curl, Python and n8n, each whole, each with the files by name.

const NOT_NEEDED = new Set(["output", "action"]);

/** The parts of an order that a program needs: settings, and the files that it sends first. */
export function recipeFor(input, model, seed, names, origin) {
  const settings = {};
  const files = [];
  for (const [field, value] of Object.entries(input)) {
    if (NOT_NEEDED.has(field)) continue;
    if (typeof value === "string" && value.startsWith("upload:"))
      files.push({ field, name: names[field] ?? `${field.replace("_path", "")}` });
    else settings[field] = value;
  }
  return {
    origin,
    model,
    files,
    settings: { ...settings, seed: seed ?? settings.seed, output: "url" },
  };
}

/** A word of a POSIX shell. */
function quoted(text) {
  return `'${String(text).replaceAll("'", "'\\''")}'`;
}

/** A program for a shell with curl and jq. */
export function curl({ origin, model, files, settings }, withToken) {
  const auth = withToken ? ` -H "Authorization: Bearer $SCAIL_TOKEN"` : "";
  const body = JSON.stringify({ model, input: settings }, null, 2);
  const sends = files
    .map((file, place) => ` --arg file${place} "$(send ${quoted(file.name)})"`)
    .join("");
  const adds =
    files.map((file, place) => `.input.${file.field} = $file${place}`).join(" | ") || ".";
  return `#!/bin/sh -e
# needs curl and jq; the files lie in this folder
base=${quoted(origin)}
send() { curl -fsS${auth} -F "file=@\\"$1\\"" "$base/uploads" | jq -r .medium; }
ask() { curl -fsS${auth} "$@"; }

order=${quoted(body)}
order=$(printf '%s' "$order" | jq${sends} ${quoted(adds)})
id=$(printf '%s' "$order" | ask -H 'Content-Type: application/json' --data-binary @- "$base/run" | jq -r .id)
while state=$(ask "$base/status/$id" | jq -r .status); do
  case $state in COMPLETED) break ;; FAILED | CANCELLED) ask "$base/status/$id"; exit 1 ;; esac
  sleep 1
done
ask -o clip.mp4 "$base/results/$id.mp4"
`;
}

/** A value as Python writes it. */
function python(value, indent = "") {
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value === "string") return pythonText(value);
  if (Array.isArray(value)) return `[${value.map((one) => python(one, indent)).join(", ")}]`;
  if (typeof value === "object") {
    const inner = Object.entries(value).map(
      ([key, one]) => `${indent}    ${pythonText(key)}: ${python(one, `${indent}    `)},\n`,
    );
    return `{\n${inner.join("")}${indent}}`;
  }
  return String(value);
}

/** JSON's escapes are Python's too, but for pairs of surrogates, which JSON.stringify leaves alone. */
function pythonText(text) {
  return JSON.stringify(text);
}

/** A program for Python 3, with its standard library alone. */
export function pythonProgram({ origin, model, files, settings }, withToken) {
  const auth = withToken ? `{"Authorization": "Bearer " + os.environ["SCAIL_TOKEN"]}` : "{}";
  const sends = files
    .map((file) => `order["input"][${pythonText(file.field)}] = send(${pythonText(file.name)})\n`)
    .join("");
  const imports = [
    "json",
    ...(withToken ? ["os"] : []),
    "time",
    "urllib.request",
    ...(files.length ? ["uuid"] : []),
  ];
  const sending = files.length
    ? `

def send(name):
    edge = uuid.uuid4().hex
    head = f'--{edge}\\r\\nContent-Disposition: form-data; name="file"; filename="{name}"\\r\\n\\r\\n'
    with open(name, "rb") as file:
        body = head.encode() + file.read() + f"\\r\\n--{edge}--\\r\\n".encode()
    return json.loads(ask("/uploads", body, f"multipart/form-data; boundary={edge}"))["medium"]
`
    : "";
  return `${imports.map((name) => `import ${name}`).join("\n")}

BASE = ${pythonText(origin)}
AUTH = ${auth}


def ask(path, body=None, kind="application/json"):
    headers = AUTH | ({"Content-Type": kind} if body else {})
    with urllib.request.urlopen(urllib.request.Request(BASE + path, body, headers)) as reply:
        return reply.read()

${sending}
order = ${python({ model, input: settings })}
${sends}job = json.loads(ask("/run", json.dumps(order).encode()))
while job["status"] in ("IN_QUEUE", "IN_PROGRESS"):
    time.sleep(1)
    job = json.loads(ask("/status/" + job["id"]))
if job["status"] != "COMPLETED":
    raise SystemExit(job.get("error"))
with open("clip.mp4", "wb") as file:
    file.write(ask(f"/results/{job['id']}.mp4"))
`;
}

/** An object as JSON in an expression of n8n, which ends at the first two closing braces. */
function expression(settings) {
  const rows = Object.entries(settings).map(([key, value]) => {
    const text = JSON.stringify(value);
    const isText = typeof value === "string";
    return `${JSON.stringify(key)}: ${isText ? text.replaceAll("{", "\\u007b").replaceAll("}", "\\u007d") : text}`;
  });
  return rows.join(", ");
}

/** A workflow for n8n: paste it onto the canvas. */
export function n8n({ origin, model, files, settings }, withToken) {
  const nodes = [];
  const auth = withToken
    ? {
        sendHeaders: true,
        headerParameters: {
          parameters: [{ name: "Authorization", value: "=Bearer {{ $env.SCAIL_TOKEN }}" }],
        },
      }
    : {};
  const add = (name, type, typeVersion, parameters) => {
    nodes.push({
      id: `scail-${nodes.length}`,
      name,
      type: `n8n-nodes-base.${type}`,
      typeVersion,
      position: [nodes.length * 220, 0],
      parameters,
    });
  };
  add("Start", "manualTrigger", 1, {});
  files.forEach((file, place) => {
    add(`Read ${place + 1}`, "readWriteFile", 1, {
      fileSelector: `/files/${file.name}`,
      options: {},
    });
    add(`Send ${place + 1}`, "httpRequest", 4.2, {
      method: "POST",
      url: `${origin}/uploads`,
      ...auth,
      sendBody: true,
      contentType: "multipart-form-data",
      bodyParameters: {
        parameters: [{ parameterType: "formBinaryData", name: "file", inputDataFieldName: "data" }],
      },
      options: {},
    });
  });
  const media = files
    .map(
      (file, place) =>
        `, ${JSON.stringify(file.field)}: $('Send ${place + 1}').first().json.medium`,
    )
    .join("");
  const body = `={{ JSON.stringify({ "model": ${JSON.stringify(model)}, "input": { ${expression(settings)}${media} } }) }}`;
  add("Order the clip", "httpRequest", 4.2, {
    method: "POST",
    url: `${origin}/run`,
    ...auth,
    sendBody: true,
    specifyBody: "json",
    jsonBody: body,
    options: {},
  });
  add("Wait", "wait", 1.1, { amount: 3, unit: "seconds" });
  add("How far", "httpRequest", 4.2, {
    url: `=${origin}/status/{{ $('Order the clip').first().json.id }}`,
    ...auth,
    options: {},
  });
  add("Not yet", "if", 2.2, {
    conditions: {
      options: { caseSensitive: true, leftValue: "", typeValidation: "strict", version: 2 },
      combinator: "and",
      conditions: [
        {
          id: "waits",
          leftValue: "={{ ['IN_QUEUE', 'IN_PROGRESS'].includes($json.status) }}",
          rightValue: "",
          operator: { type: "boolean", operation: "true", singleValue: true },
        },
      ],
    },
    options: {},
  });
  add("The clip", "httpRequest", 4.2, {
    url: `=${origin}/results/{{ $('Order the clip').first().json.id }}.mp4`,
    ...auth,
    options: { response: { response: { responseFormat: "file" } } },
  });
  const connections = {};
  const to = (node) => ({ node, type: "main", index: 0 });
  nodes
    .slice(0, -2)
    .forEach((node, place) => (connections[node.name] = { main: [[to(nodes[place + 1].name)]] }));
  connections["Not yet"] = { main: [[to("Wait")], [to("The clip")]] };
  return JSON.stringify({ name: "SCAIL clip", nodes, connections, settings: {} }, null, 2);
}
