// Drives the pages for browsers in Chromium, by playwright-core: `node browser_page.js CHROMIUM URL LOCKED_URL KEY OUT`.
// Prints what it saw as one JSON object; OUT is a directory for screenshots.
"use strict";
const [executablePath, url, lockedUrl, key, out] = process.argv.slice(2);
const { chromium } = require(process.env.PLAYWRIGHT_CORE);

async function main() {
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
  const seen = { errors: [], requests: [] };
  async function open(address, options) {
    const page = await (await browser.newContext(options)).newPage();
    page.setDefaultTimeout(30000);
    page.on("pageerror", (error) => seen.errors.push(String(error)));
    page.on("request", (request) => seen.requests.push(request.url()));
    await page.goto(address);
    return page;
  }
  async function ask(page, text, tokens) {
    await page.evaluate(() => { document.getElementById("settings").open = true; });
    await page.fill("#max_tokens", String(tokens));
    await page.fill("#text", text);
    await page.press("#text", "Enter");
  }
  const idle = (page) => page.waitForFunction(() => document.getElementById("stop").disabled);

  const page = await open(url + "/", { viewport: { width: 1000, height: 800 } });
  await page.waitForFunction(() => document.getElementById("model").textContent.length > 3);
  seen.state = await page.textContent("#state");
  seen.model = await page.textContent("#model");
  await ask(page, "<img src=x onerror=alert(1)> & <b>bold</b>\nsecond line", 16);
  await page.waitForSelector(".speed");
  await idle(page);
  seen.question = await page.textContent(".turn.user");
  seen.answer = await page.textContent(".turn.assistant");
  seen.speed = await page.textContent(".speed");
  seen.images = await page.locator("main img, main b").count();
  await page.screenshot({ path: out + "/light.png" });

  await ask(page, "go on", 3000);
  await page.waitForFunction(() => document.querySelectorAll(".turn.assistant")[1]?.textContent.length > 20);
  await page.click("#stop");
  await idle(page);
  seen.stopped = (await page.textContent(".turn.assistant >> nth=1")).includes("[stopped]");
  await ask(page, "too much", 1000000);
  seen.refusal = await page.textContent(".turn.error");

  const narrow = await open(lockedUrl + "/v1", { viewport: { width: 360, height: 740 }, colorScheme: "dark" });
  await narrow.waitForFunction(() => document.getElementById("settings").open);
  seen.locked = await narrow.textContent("#model");
  await narrow.fill("#key", key);
  await narrow.press("#key", "Tab");
  await narrow.waitForFunction(() => document.title.includes("Pagewire") && document.title.length > 12);
  await ask(narrow, "hello", 8);
  await narrow.waitForSelector(".speed");
  seen.overflow = await narrow.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  seen.background = await narrow.evaluate(() => getComputedStyle(document.body).backgroundColor);
  await narrow.screenshot({ path: out + "/dark.png" });

  await narrow.goto(lockedUrl + "/docs");
  await narrow.waitForSelector("details.route");
  seen.routes = await narrow.locator("details.route").count();
  seen.fields = await narrow.locator("details.route >> nth=0 >> tr").count();
  seen.docsOverflow = await narrow.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  await narrow.screenshot({ path: out + "/docs.png" });
  await browser.close();
  console.log(JSON.stringify(seen));
}
main().catch((error) => { console.error(error); process.exit(1); });
