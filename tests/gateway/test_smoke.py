import asyncio, time
from tests.gateway import harness
from tests.gateway.harness import *
async def test_storm(front, keys, room, tmp_path):
  for slots in (8, 64):
    e = room.start(slots=slots, sim_itl_ms=100)
    async with harness.front(keys, tmp_path/"b") as two:
        front.serve(e); two.serve(e)
        A = [asyncio.create_task(front.ask(body=chat(max_tokens=1000))) for i in range(slots)]
        await eventually("", lambda: front.metric("steelyard_requests_running")==slots)
        await asyncio.sleep(.5)
        d0 = await e.door()
        t=time.time(); c=time.process_time()
        B = [asyncio.create_task(two.ask(body=chat(max_tokens=10))) for i in range(slots)]
        await asyncio.sleep(3)
        d = await e.door()
        print(slots, "refused", d["refused"]-d0["refused"], "wall", time.time()-t, "cpu", time.process_time()-c)
        for t in A+B: t.cancel()
        await asyncio.gather(*A,*B,return_exceptions=True)
        await two.rest()
